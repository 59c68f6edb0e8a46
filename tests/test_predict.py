"Any video in, one row a frame out: the pipeline's numbers, every frame at its time, everybody in a table of their own, and nothing written that must not be."
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from clips import annotate, beeps, draw_face, talking, wall, write_video
from conftest import ROOT, environment

from sage_nb.affwild2 import Corpus
from sage_nb.backbones import save_encoder
from sage_nb.baselines import build_model
from sage_nb.cli import main, predict
from sage_nb.core import DataError, content_hash, read_json, write_arrays, write_json
from sage_nb.encoders import AudioEncoder, VisualEncoder
from sage_nb.features import CUE_OWNERS, CUES, encode_corpus, load_sequence, prepare_corpus
from sage_nb.interaction import Estimator
from sage_nb.media import face_finder, read_frames
from sage_nb.pipeline import provenance, read_params, read_stages, stage_parameters
from sage_nb.predict import COLUMNS, Everybody, Predictor, PredictionTable, measure_prediction, read_origin, write_prediction
from sage_nb.training import fit, load_run, model_arrays, predict_sequences

INTERVALS = ["valence_low", "valence_high", "arousal_low", "arousal_high"]
RELIABILITY = ["reliability_visual", "reliability_audio"]


def moments(count, rate=25.0):
    return np.arange(count) / rate


def film(path, count=50, rate=25.0, images=None, times=None, sound=True, **options) -> Path:
    times = moments(count, rate) if times is None else times
    seconds = times[-1] + 0.1
    return write_video(path, images or talking(len(times)), times, beeps(np.arange(0.3, seconds, 0.5), seconds, length=0.2) if sound else None, **options)


def save_run(folder, model, **record):
    write_arrays(folder / "model.safetensors", model_arrays(model))
    write_json(folder / "run.json", dict(recipe=model.recipe, configuration=model.configuration, name=model.name, **record))


def build(name, **options):
    torch.manual_seed(1)
    return build_model(name, 64, 64, len(CUES), cue_owners=CUE_OWNERS, **options).eval()


PARAMETERS = dict(prepare=dict(detect_every=3, face_model=None, several_faces=None, smallest_face=0.25, crop_size=64), encode=dict(half=True))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    "A project as the pipeline leaves it, of four short videos: their features, and runs beside the records of how they came about."
    root = tmp_path_factory.mktemp("predict") / "project"
    (root / "data/pretrain").mkdir(parents=True)
    (root / "data/pretrain/any.txt").write_text("of people who only train encoders\n")
    away = talking(60)
    away[20:35] = [wall()] * 15
    film(root / "data/corpus/away.mp4", images=away, times=moments(60))
    film(root / "data/corpus/disc.avi", 45, 30.0)
    film(root / "data/corpus/uneven.mp4", times=np.cumsum(np.random.default_rng(0).choice([0.033, 0.04, 0.067], 50)))
    film(root / "data/corpus/silent.mp4", 40, sound=False)
    for part, name, count in (("Train", "away", 60), ("Train", "disc", 45), ("Validation", "uneven", 50), ("Validation", "silent", 40)):
        annotate(root / f"data/corpus/VA_Estimation_Challenge/{part}_Set/{name}.txt", np.random.default_rng(count).uniform(-1, 1, (count, 2)))
    prepare_corpus(Corpus(root / "data/corpus"), root / "work/prepared/corpus", workers=1, **PARAMETERS["prepare"])
    torch.manual_seed(0)
    save_encoder(root / "work/encoders/visual.safetensors", VisualEncoder())
    save_encoder(root / "work/encoders/audio.safetensors", AudioEncoder())
    encode_corpus(root / "work/prepared/corpus", root / "work/encoders", root / "work/features", workers=1, **PARAMETERS["encode"])
    sequences = [load_sequence(root / f"work/features/{name}.safetensors") for name in ("away", "disc", "uneven")]
    fit(build("sage"), sequences[:1], sequences[1:2], sequences[2:], root / "work/runs/sage-0", epochs=1, refine_steps=2, window=40)
    write_records(root)
    return root


def write_records(root, paths=("data/corpus", "data/pretrain")):
    "As the runner writes them, stage by stage."
    corpus, pretrain = paths
    chain = [("prepare", "work/prepared/corpus", [corpus, pretrain], dict(corpus=corpus, pretrain=pretrain, prepared="work/prepared", **PARAMETERS["prepare"])),
             ("pretrain", "work/encoders", ["work/prepared/corpus"], dict(prepared="work/prepared", encoders="work/encoders", visual={}, audio={})),
             ("encode", "work/features", ["work/prepared/corpus", "work/encoders"], dict(encoders="work/encoders", features="work/features", **PARAMETERS["encode"])),
             ("train", "work/runs", ["work/features"], dict(features="work/features", runs="work/runs"))]
    for _, out, _, _ in chain:
        (root / out / "stage.json").unlink(missing_ok=True)
    for stage, out, inputs, parameters in chain:
        write_json(root / out / "stage.json", provenance(root, stage, inputs, parameters))


@pytest.fixture(scope="module")
def predictor(project):
    return Predictor.load(project / "work/runs/sage-0")


# --- the pipeline's numbers

@pytest.mark.parametrize("name, kind", [("away", "mp4"), ("disc", "avi"), ("uneven", "mp4"), ("silent", "mp4")])
def test_the_numbers_are_those_of_the_pipeline(project, predictor, name, kind):
    table, sequence = predictor.predict(project / f"data/corpus/{name}.{kind}"), load_sequence(project / f"work/features/{name}.safetensors")
    [said] = predict_sequences(load_run(project / "work/runs/sage-0"), [sequence])
    assert len(table) == len(sequence) and (table.face_found == sequence.visual_ok).all()
    expected = dict(valence=said.va[:, 0], arousal=said.va[:, 1])
    for d, axis in enumerate(("valence", "arousal")):
        expected |= {f"{axis}_low": np.clip(said.va[:, d] - said.half_width[:, d], -1, 1), f"{axis}_high": np.clip(said.va[:, d] + said.half_width[:, d], -1, 1)}
    for m, (modality, ok) in enumerate(dict(visual=sequence.visual_ok, audio=sequence.audio_ok).items()):
        expected[f"reliability_{modality}"] = np.where(ok, said.reliability[:, m].mean(1), 0)
    for column, values in expected.items():
        assert np.abs(table[column] - values).max() < 1e-6, column
    assert (sequence.visual_ok.all(), sequence.audio_ok.any()) == (name != "away", name != "silent")


def test_the_parameters_of_the_pipeline_are_those_that_are_read(predictor):
    "Each of what the run's corpus was prepared with changes a number; and stages have them under the names that are looked for."
    stages = {stage: stage_parameters(ROOT, stage, ROOT / "nbs" / Path(entry["notebook"]).name) for stage, entry in read_stages(ROOT, read_params(ROOT)["paths"]).items()}
    assert set(PARAMETERS["prepare"]) | {"corpus", "pretrain"} <= set(stages["prepare"]) and {"half", "encoders"} <= set(stages["encode"])
    assert {"visual", "audio"} <= set(stages["pretrain"])
    assert predictor.origin.search == {name: value for name, value in PARAMETERS["prepare"].items() if name != "crop_size"}
    assert (predictor.origin.crop_size, predictor.origin.half) == (64, True)


@pytest.mark.parametrize("name", sorted(Estimator.registry))
def test_every_model_predicts(project, name):
    save_run(project / f"work/runs/{name}-9", build(name))
    table = Predictor.load(project / f"work/runs/{name}-9").predict(project / "data/corpus/away.mp4")
    [said] = predict_sequences(load_run(project / f"work/runs/{name}-9"), [load_sequence(project / "work/features/away.safetensors")])
    assert np.abs(table[["valence", "arousal"]].to_numpy() - said.va).max() < 1e-6 and table.about["model"] == name
    assert table[INTERVALS].isna().all().all() == (said.half_width is None) and table[RELIABILITY].isna().all().all() == (said.reliability is None)
    assert name == "sage" or said.reliability is None or len(said.reliability)
    table.plot_curves()


def test_a_model_without_cues_gets_none(project):
    torch.manual_seed(0)
    save_run(project / "work/runs/bare-0", build_model("sage", 64, 64, 0))
    assert Predictor.load(project / "work/runs/bare-0").predict(project / "data/corpus/disc.avi").valence.notna().all()


# --- every frame at its time

def turned():
    "Pictures of a phone held upright: stored lying, to be turned by the player."
    return [np.ascontiguousarray(np.rot90(draw_face(np.full((240, 160, 3), 110, np.uint8), y=150.0), -1)) for _ in range(30)]


UNEVEN = np.cumsum(np.random.default_rng(3).choice([0.02, 0.033, 0.1, 0.3], 30))
KINDS = dict(film24=dict(count=24, rate=24.0), video25=dict(count=25), ntsc=dict(count=30, rate=30000 / 1001), fast=dict(count=60, rate=60.0), uneven=dict(times=UNEVEN),
             second=dict(count=30, rate=30.0), picture=dict(count=1), silent=dict(count=25, sound=False), empty=dict(count=25, images=[wall()] * 25),
             neither=dict(count=25, images=[wall()] * 25, sound=False), upright=dict(count=30, images=turned(), turned=90),
             portrait=dict(count=25, images=[draw_face(np.full((320, 180, 3), 110, np.uint8), x=90.0, y=200.0) for _ in range(25)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("container", ["mp4", "avi"])
def test_every_frame_is_a_row_at_its_time(predictor, tmp_path, kind, container):
    how = dict(KINDS[kind])
    if container == "avi" and ({"times", "turned"} & set(how) or how.get("count") == 1):
        how = dict(count=20, rate=15.0)  # which has neither uneven times nor a flag
    if how.get("count") == 1:
        how |= dict(images=[wall(), draw_face(wall())][1:], times=np.array([0.0, 0.04]))  # a rate needs two times; the second has no picture
    expected = how.get("times", moments(how.get("count", 0), how.get("rate", 25.0)))
    expected = expected[: len(how["images"])] if "images" in how else expected
    [table] = predictor.predict_faces(film(tmp_path / f"video.{container}", **how))
    assert tuple(table.columns) == COLUMNS and table.frame.tolist() == list(range(1, len(expected) + 1))
    assert np.abs(table.time - expected).max() < 0.0011
    assert table[["valence", "arousal", *INTERVALS, *RELIABILITY]].notna().all().all()
    seen, heard = kind not in ("empty", "neither"), how.get("sound", True)
    assert table.face_found.all() if seen else not table.face_found.any()
    assert (table.reliability_visual > 0).equals(table.face_found) and table[["face_x", "face_width"]].notna().all(axis=1).equals(table.face_found)
    assert heard or not table.voice_heard.any() and (table.reliability_audio == 0).all()


def test_the_face_lies_where_it_is_shown(predictor, tmp_path):
    "In pixels of the picture as a player turns it."
    upright = predictor.predict(film(tmp_path / "upright.mp4", **KINDS["upright"]))
    middle = upright.face_x + upright.face_width / 2, upright.face_y + upright.face_height / 2
    assert abs(middle[0] - 80).max() < 15 and abs(middle[1] - 150).max() < 20


def test_what_is_seen_and_heard_is_so_in_its_own_frames(predictor, tmp_path):
    images = talking(100)
    images[40:70] = [wall()] * 30
    loud = beeps([1.0], 4.0, length=0.8)
    video = write_video(tmp_path / "video.mp4", images, moments(100), loud[44100 // 2 :], sound_start=0.5)
    table = predictor.predict(video).set_index("frame")
    assert not table.face_found[41:70].any() and table.face_found[:40].all() and table.face_found[76:].all()
    assert (table.voice_heard == table.time.between(1, 1.8)).mean() > 0.94 and table.voice_heard[table.time.between(1.1, 1.7)].all()
    assert not table.voice_heard[table.time < 0.9].any() and (table.reliability_audio[table.time < 0.4] == 0).all()


def test_a_video_cut_off_is_a_sentence(predictor, tmp_path):
    video = film(tmp_path / "video.avi", 60)
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    for path in (video, tmp_path / "none.mp4"):
        with pytest.raises(DataError, match=path.name):
            predictor.predict_faces(path)


def test_memory_does_not_grow_with_the_video(tmp_path):
    "Crops alone would be 52 MB, each of the three times that they are kept."
    images = talking(20)
    for count in (150, 1200):
        write_video(tmp_path / f"{count}.avi", [images[k % 20] for k in range(count)], moments(count), np.full(640 * count, 0.1), rate=16000)
    code = ("import re, sys; from sage_nb.predict import watch\nfor count in (150, 1200):\n"
            "    [trial] = watch(f'{sys.argv[1]}/{count}.avi', sys.argv[1], everybody=True, crop_size=128)\n"
            "    print(len(trial['crops']), *re.findall(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read()))")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment(ROOT), capture_output=True, text=True, check=True)
    (short, before), (long, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (short, long) == (150, 1200) and after - before < 25_000
    assert {path.suffix for path in tmp_path.iterdir()} == {".avi"}  # and nothing is left on disk


# --- who is in it

def people(count, *places):
    "Pictures of several people; each place is a function of the picture's number that gives x and y, or nothing."
    images = []
    for number in range(count):
        image = np.full((160, 320, 3), 110, np.uint8)
        for place in places:
            if (at := place(number)) is not None:
                draw_face(image, *at, mouth=0.5 + 0.5 * np.sin(number / 3))
        images.append(image)
    return images


def still(x, y=80.0, first=0, last=10**6):
    return lambda number: (x, y) if first <= number < last else None


CASES = {  # places, number of tables
    "one": ([still(80)], 1), "nobody": ([], 1), "two": ([still(80), still(240)], 2),
    "one who jumps": ([still(80, last=60), still(240, first=60)], 1),
    "one who comes back": ([still(80, last=50), still(82, first=100)], 1),
    "a second who passes": ([still(80), still(240, first=70, last=95)], 1),
    "a second who comes late": ([still(80), still(240, first=60)], 2),
    "a second who goes and comes back": ([still(80), lambda k: (240, 80) if k < 60 or k > 100 else None], 2),
    "one walks": ([still(250), lambda k: (50 + k / 2, 80)], 2)}


@pytest.mark.parametrize("case", CASES)
def test_everybody_gets_a_table(predictor, tmp_path, case):
    places, expected = CASES[case]
    video = write_video(tmp_path / "video.mp4", people(150, *places), moments(150), beeps([1.0], 6.0, length=4.0))
    tables = predictor.predict_faces(video)
    assert len(tables) == expected and all(len(table) == 150 for table in tables)
    if expected == 1:
        alone = predictor.predict(video)
        assert tables[0].equals(alone) and tables[0].about == alone.about and alone.about["face"] is None
        return
    for face, (table, place) in enumerate(zip(tables, sorted(places, key=lambda place: (place(0) is None, (place(0) or place(149))[0]))), 1):
        there = [place(k) for k in range(150)]
        here = np.array([at is not None for at in there])
        assert table.about["face"] == face and (table.face_found == here).mean() > 0.9, case
        found = table.face_found & here
        middle = (table.face_x + table.face_width / 2)[found]
        assert np.abs(middle - [at[0] for at, ok in zip(there, found) if ok]).max() < 25
    assert not tables[0].valence.equals(tables[1].valence)


class Erring:
    "A detector that sees the face at x = 80, and now and then something at 240."

    def __init__(self, wrong):
        self.wrong, self.looks = wrong, 0

    def __call__(self, image, least=0.0, most=np.inf):
        self.looks += 1
        boxes = [[35.0, 35.0, 90.0, 90.0]] + [[195.0, 35.0, 90.0, 90.0]] * self.wrong(self.looks)
        return np.array(boxes), np.ones(len(boxes))


@pytest.mark.parametrize("wrong, expected", [(lambda look: look < 5, 1), (lambda look: look % 3 == 0, 1), (lambda look: True, 2)])
def test_what_is_seldom_detected_is_nobody(wrong, expected):
    finder = face_finder()
    finder.detector = Erring(wrong)
    everybody, grain = Everybody(finder), np.random.default_rng(0).integers(0, 40, (10, 20, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    for image in people(150, still(80)):
        everybody(image + grain)
    assert len(everybody.people) == expected and finder.detector.looks <= 40


# --- where a run comes from

def test_a_run_of_real_people_says_what_it_was_trained_on(predictor, project):
    assert not predictor.origin.demonstration
    assert predictor.origin.trained_on == "sage-0 was trained on the corpus in data/corpus (visual encoder: learned from data/pretrain; audio encoder: learned from data/pretrain)."
    table = predictor.predict(project / "data/corpus/disc.avi")
    assert table.about == dict(video=str(project / "data/corpus/disc.avi"), run=str(project / "work/runs/sage-0"), model="sage", trained_on=predictor.origin.trained_on,
                               demonstration=False, face=None)


def test_a_run_of_the_sample_says_so_until_the_sample_is_another(tmp_path, project):
    runs, sample = tmp_path / "work/runs", tmp_path / "data/sample.json"
    record = read_json(project / "work/runs/stage.json")
    for name in ("corpus", "pretrain"):
        (tmp_path / "data" / name / "videos").mkdir(parents=True)
        (tmp_path / "data" / name / "videos" / f"{name[:3]}001.mp4").write_text(name)
    prepared = record["inputs"]["work/features"]["made_by"]["inputs"]["work/prepared/corpus"]["made_by"]
    for place, about in prepared["inputs"].items():
        about["hash"] = content_hash(tmp_path / place)
    write_json(runs / "stage.json", record)
    assert not read_origin(runs / "sage-0").demonstration
    write_json(sample, dict(videos=2))
    assert read_origin(runs / "sage-0").demonstration
    (tmp_path / "data/corpus/videos/mine.mp4").write_text("of somebody")
    assert not read_origin(runs / "sage-0").demonstration
    (tmp_path / "data/corpus/videos/mine.mp4").rename(tmp_path / "mine.mp4")
    assert read_origin(runs / "sage-0").demonstration
    (tmp_path / "data/corpus/videos/cor001.mp4").write_text("another")
    assert not read_origin(runs / "sage-0").demonstration


def test_published_encoders_are_named_and_a_face_model_is_looked_for_in_the_project(project):
    record = read_json(project / "work/runs/stage.json")
    encoded = record["inputs"]["work/features"]["made_by"]
    encoded["inputs"]["work/encoders"]["made_by"]["parameters"].update(visual=dict(encoder="ir50", weights="w"), audio={})
    encoded["inputs"]["work/prepared/corpus"]["made_by"]["parameters"]["face_model"] = "models/yunet.onnx"
    (project / "models").mkdir()
    (project / "models/yunet.onnx").touch()
    write_json(project / "work/others/stage.json", record)
    origin = read_origin(project / "work/others/sage-0")
    assert "(visual encoder: ir50; audio encoder: learned from data/pretrain)" in origin.trained_on
    assert origin.search["face_model"] == str(project / "models/yunet.onnx")


# --- the command

@pytest.fixture
def desk(project, tmp_path, monkeypatch) -> Path:
    "A folder with two videos, outside of any repository, where the run is in its place."
    (tmp_path / "work").symlink_to(project / "work")
    (tmp_path / "data").symlink_to(project / "data")
    film(tmp_path / "talk.mp4", 30)
    write_video(tmp_path / "two.mp4", people(75, still(80), still(240)), moments(75))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_files_folders_and_patterns(desk, capsys):
    assert main(["predict", "talk.mp4", ".", "t*.mp4", "--out", "out", "--plot"]) == 0
    assert files(desk / "out") == ["talk.csv", "talk.png", "two_face1.csv", "two_face1.png", "two_face2.csv", "two_face2.png"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and said[0].startswith("sage-0 was trained on the corpus in data/corpus") and said[1].startswith("talk.mp4: 30 frames, face found in 100 %, voice")
    table = pd.read_csv(desk / "out/talk.csv")
    alone = Predictor.load("work/runs/sage-0").predict("talk.mp4")
    assert tuple(table.columns) == COLUMNS and np.abs(table.astype(float) - alone.astype(float)).max().max() < 1e-6
    first = (desk / "out/talk.csv").read_bytes()
    assert main(["predict", "*lk.mp4", "--out", "again", "--faces", "main", "--run", "work/runs/sage-0"]) == 0
    assert files(desk / "again") == ["talk.csv"] and (desk / "again/talk.csv").read_bytes() == first
    assert main(["predict", "two.mp4", "--out", "main", "--faces", "main", "--format", "parquet"]) == 0
    assert files(desk / "main") == ["two.parquet"] and len(pd.read_parquet("main/two.parquet")) == 75


def test_videos_of_one_name_get_a_table_each(desk):
    for name in ("a/clip.mp4", "b/clip.mp4", "b/clip.avi", "b/other.mp4"):
        film(desk / name, 10)
    assert main(["predict", "a", "b", "--out", "out", "--faces", "main"]) == 0
    assert files(desk / "out") == ["a_clip.mp4.csv", "b_clip.mp4.csv", "clip.avi.csv", "other.csv"]


def test_nothing_is_written_over(desk, capsys):
    assert main(["predict", "talk.mp4"]) == 0
    before = (desk / "talk.csv").read_bytes()
    (desk / "talk.csv").write_bytes(b"mine")
    (desk / "two_face1.csv").write_bytes(b"mine")
    assert main(["predict", "talk.mp4", "two.mp4"]) == 2
    told = capsys.readouterr().err
    assert told.count("is there already") == told.count("\n") == 2 and (desk / "talk.csv").read_bytes() == (desk / "two_face1.csv").read_bytes() == b"mine"
    (desk / "talk_face3.csv").write_bytes(b"mine")
    assert main(["predict", "talk.mp4", "--force"]) == 0 and (desk / "talk.csv").read_bytes() == before
    assert capsys.readouterr().err.startswith("sage-nb: talk_face3.csv: not of this prediction") and (desk / "talk_face3.csv").read_bytes() == b"mine"
    (desk / "talk_overlay.mp4").write_bytes((desk / "talk.mp4").read_bytes())
    assert main(["predict", "talk.mp4", "talk_overlay.mp4", "--force", "--overlay", "--faces", "main"]) == 2  # a video that is given is not written over
    assert (desk / "talk_overlay.mp4").read_bytes() == (desk / "talk.mp4").read_bytes() and "talk_overlay.mp4: is there already" in capsys.readouterr().err
    assert main(["predict", ".", "--out", "folder", "--faces", "main"]) == 0 and files(desk / "folder") == ["talk.csv", "two.csv"]  # nor one that was made taken for one
    (desk / "half").mkdir()
    (desk / "half/two_face2.csv").touch()
    assert main(["predict", "two.mp4", "--out", "half"]) == 2 and files(desk / "half") == ["two_face2.csv"]  # all of it or nothing
    (desk / "two_face1.mp4").write_bytes((desk / "talk.mp4").read_bytes())
    assert main(["predict", "two.mp4", "two_face1.mp4", "--out", "out", "--force"]) == 2  # two videos, one name for a table
    assert files(desk / "out") == ["two_face1.csv", "two_face2.csv"] and len(pd.read_csv(desk / "out/two_face1.csv")) == 75


def test_a_broken_video_is_named_and_the_others_go_on(desk, capsys):
    (desk / "bad.mp4").write_bytes((desk / "talk.mp4").read_bytes()[:900])
    (desk / "empty").mkdir()
    assert main(["predict", "none.mp4", "empty", "bad.mp4", "talk.mp4", "--out", "out"]) == 2
    told = capsys.readouterr()
    assert files(desk / "out") == ["talk.csv"] and "talk.mp4: 30 frames" in told.out
    lines = told.err.splitlines()
    assert [re.match(r"sage-nb: (\S+):", line)[1] for line in lines] == ["none.mp4", "empty", "bad.mp4"] and "Traceback" not in told.err


def test_what_cannot_be_written_is_one_sentence(desk, capsys):
    (desk / "file").touch()
    (desk / "folder/talk.csv").mkdir(parents=True)
    for out in ("file", "file/below", "folder"):
        assert main(["predict", "talk.mp4", "--out", out, "--force"]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and told.startswith(f"sage-nb: {out}") and "--out" in told


def test_a_face_far_away_is_found_when_it_is_asked_for(desk, capsys):
    far = cv2.resize(people(1, still(80))[0], None, fx=0.45, fy=0.45, interpolation=cv2.INTER_AREA)
    images = [cv2.copyMakeBorder(far, 80, 80, 80, 80, cv2.BORDER_REPLICATE)] * 30
    write_video(desk / "far.mp4", images, moments(30))
    assert main(["predict", "far.mp4", "--out", "usual"]) == 0 and "far.mp4: no face found; none narrower than 0.2" in capsys.readouterr().err
    assert main(["predict", "far.mp4", "--out", "near", "--smallest-face", "0.1"]) == 0 and not capsys.readouterr().err
    assert pd.read_csv("near/far.csv").face_found.mean() > 0.9
    assert main(["predict", "far.mp4", "--out", "none", "--smallest-face", "7"]) == 2 and "must be in [0.02, 1]" in capsys.readouterr().err


def test_any_name_is_shown_as_it_is(desk, capsys):
    for name in (r"cost $5_{ and $6.mp4", os.fsdecode(b"\xff\xe9.mp4")):
        (desk / "names").mkdir(exist_ok=True)
        (desk / "names" / name).write_bytes((desk / "talk.mp4").read_bytes())
    assert main(["predict", "names", "--out", "named", "--plot"]) == 0 and len(files(desk / "named")) == 4


def test_without_a_run_there_is_one_sentence(desk, capsys):
    with pytest.raises(DataError, match="make repro"):
        predict(["talk.mp4"], run="work/runs/none-0", out="out")
    assert main(["predict", "talk.mp4", "--run", "work/runs/none-0", "--out", "out"]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "make repro" in told.err and not told.out and not (desk / "out").exists()


def test_what_git_would_take_is_not_written(desk, capsys):
    subprocess.run(["git", "init", "-q", desk], check=True, env=environment(desk))
    (desk / ".gitignore").write_text("results-local/\n*.csv\n")
    assert main(["predict", "talk.mp4", "--out", "tables", "--plot"]) == 2  # the picture
    assert "tables/talk.png: git would take this file" in capsys.readouterr().err and not (desk / "tables").exists()
    assert main(["predict", "talk.mp4", "--out", "results-local", "--plot"]) == 0 and files(desk / "results-local") == ["talk.csv", "talk.png"]
    made = ["talk.csv", "talk.png", "talk.html", "talk_overlay.mp4", "talk.parquet"]  # in a checkout, where it is called from there
    assert subprocess.run(["git", "check-ignore", "--no-index", *made], cwd=ROOT, capture_output=True, text=True).stdout.split() == made


# --- what is measured

def test_the_record_of_what_it_costs(tmp_path):
    rows = measure_prediction(tmp_path, seconds=1.0, rounds=1)
    assert [row["name"].partition(",")[0] for row in rows] == ["predict", "predict_faces", "predict_faces"]
    for row in rows:
        assert row["met"] == (row["sides"][0] >= row["sides"][1] == 30) and abs(row["value"] - row["sides"][0] / 30) < 0.01
        assert 0.3 < float(re.search(r"([\d.]+) Mbit/s", row["name"])[1]) < 3  # as such videos have
    assert write_prediction(tmp_path / "prediction.json", rows) == read_json(tmp_path / "prediction.json")


def test_tables_that_are_joined_keep_what_is_true_of_both(predictor, project):
    tables = [predictor.predict(project / "data/corpus" / name) for name in ("away.mp4", "disc.avi")]
    both = pd.concat(tables)
    assert both.about["trained_on"] == tables[0].about["trained_on"] and "video" not in both.about
    assert "<table" in tables[0].iloc[:0]._repr_html_()


def test_a_table_stays_one(predictor, project):
    table = predictor.predict(project / "data/corpus/away.mp4")
    part = table[table.face_found]
    assert isinstance(part, PredictionTable) and part.about == table.about and "data:image/png;base64," in part._repr_html_()
    assert "&lt;b&gt;" in make_up(table, "<b>.mp4") and "<b>" not in make_up(table, "<b>.mp4")
    assert "<img" not in table[["valence"]]._repr_html_() and "<img" not in PredictionTable(dict(a=[1]))._repr_html_()


def make_up(table, video) -> str:
    other = table.copy()
    other.about = table.about | dict(video=video)
    return other._repr_html_()


def test_two_people_are_two_in_the_pictures_that_are_read(tmp_path):
    "The tracks cover what is seen, each picture once."
    video = write_video(tmp_path / "video.mp4", people(60, still(80), still(240)), moments(60))
    everybody = Everybody(face_finder())
    seen = [everybody(frame.image) for frame in read_frames(video)]
    assert [len(faces) for faces in seen] == [2] * 60 and [[track.pictures for track in tracks] for tracks in everybody.people] == [[60], [60]]
