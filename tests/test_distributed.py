"""The corpus as it is distributed: face pictures in folders and archives, containers of all kinds, a report that misses nothing."""
import json
import tracemalloc
import warnings
import zipfile
from dataclasses import replace
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from clips import annotate, beeps, draw_face, talking, wall, write_video
from corpora import UTF8, archive, jpg, official_tree

from sage_nb.affwild2 import Corpus, Trial, read_crop_files, summarise, video_info
from sage_nb.backbones import save_encoder
from sage_nb.cli import main
from sage_nb.core import DataError, read_arrays
from sage_nb.corruption import FAMILIES, plan_stretches, seeded
from sage_nb.encoders import AudioEncoder, VisualEncoder
from sage_nb.features import encode_corpus, prepare_corpus, read_prepared
from sage_nb.media import look_closely, read_crops, read_frames, read_sound, read_trial
from sage_nb.suite import _look_again, encode_corrupted

COUNT = 12


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", [wall(size=32)] * COUNT, np.arange(COUNT) / 25, beeps([0.1], 0.48))


@pytest.fixture
def root(tmp_path, clip):
    "A clean corpus: two trials of one video, and one called Köln."
    root = tmp_path / "corpus"
    (root / "videos").mkdir(parents=True)
    for name in ("two", "Köln"):
        (root / "videos" / f"{name}.mp4").hardlink_to(clip)
    for trial in ("two_left", "two_right", "Köln"):
        annotate(root / "VA_Estimation_Challenge" / "Train_Set" / f"{trial}.txt", [[0.1, 0.2]] * COUNT)
    return root


def crops_of(root):
    return {trial.id: trial.crops for trial in Corpus(root).trials()}


def faces(trial, numbers=(1, 2, 5)):
    return [(f"cropped_aligned/{trial}/{number:05d}.jpg".encode(), jpg(10 * number)) for number in numbers]


# --- where face pictures lie

@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("before", [b"", b"#!/bin/sh\n" * 9])
@pytest.mark.parametrize("name", ["cropped_aligned.zip", "cropped_aligned_new_50_vids.ZIP", "faces/cropped_aligned/batch1.zip"])
def test_archives_are_read_where_they_are(root, name, before, wide):
    archive(faces("two_left") + faces("two_right", [3]), root / name, before, wide)
    crops = crops_of(root)
    assert crops["two_left"].numbers.tolist() == [1, 2, 5] and crops["two_right"].numbers.tolist() == [3] and crops["Köln"] is None
    assert [(number, content) for number, content in read_crop_files(crops["two_left"])] == [(n, jpg(10 * n)) for n in (1, 2, 5)]
    assert [round(frame.image.mean()) for frame in read_crops(crops["two_left"])] == [10, 20, 50]


def test_an_archive_made_by_python_is_read(root):
    with zipfile.ZipFile(root / "cropped_aligned.zip", "w") as file:
        for number, method in ((7, zipfile.ZIP_STORED), (3, zipfile.ZIP_DEFLATED)):
            with file.open(zipfile.ZipInfo(f"Köln/{number:05d}.jpg"), "w", force_zip64=True) as entry:
                entry.write(jpg(number))
            file.writestr(f"two_left/{number:05d}.jpg", jpg(number), method)
    crops = crops_of(root)
    assert [*read_crop_files(crops["Köln"])] == [*read_crop_files(crops["two_left"])] == [(3, jpg(3)), (7, jpg(7))]


@pytest.mark.parametrize("name, flags", [("Köln".encode(), UTF8), ("Köln".encode(), 0), ("Köln".encode("cp437"), 0)])
def test_names_in_archives(root, name, flags):
    archive([(b"a/" + name + b"/00001.jpg", jpg(), flags, 8), (b"a\\two_left\\00002.jpg", jpg(), 0, 0)], root / "cropped_aligned.zip")
    crops = crops_of(root)
    assert crops["Köln"].numbers.tolist() == [1] and crops["two_left"].numbers.tolist() == [2]


def test_what_is_no_face_picture_is_left_out(root):
    names = ["00000.jpg", "1.jpg", "000001.jpg", "00001.JPG", "00002.png", "x.jpg", ".DS_Store", "._00001.jpg", "00003.jpg"]
    for folder in (root / "cropped_aligned" / "Köln",):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes(jpg())
    archive([(f"b/two_left/{name}".encode(), jpg()) for name in names] + [(b"b/two_left/", b"", 0, 0), (b"__MACOSX/two_right/00001.jpg", b"")],
            root / "cropped_aligned.zip")
    crops = crops_of(root)
    for trial in ("Köln", "two_left"):
        assert crops[trial].numbers.tolist() == [3] and crops[trial].others == 6
    assert crops["two_right"] is None


def test_a_folder_comes_before_an_archive_and_a_later_entry_before_an_earlier(root):
    archive(faces("Köln", [1]) + faces("two_left", [4]) + [(b"cropped_aligned/two_left/00004.jpg", jpg(200))] + faces("two_left", [6]), root / "cropped_aligned.zip")
    (root / "cropped_aligned" / "batch2" / "Köln").mkdir(parents=True)
    (root / "cropped_aligned" / "batch2" / "Köln" / "00009.jpg").write_bytes(jpg(99))
    (root / "cropped_aligned" / "round").symlink_to(root / "cropped_aligned")
    crops = crops_of(root)
    assert [*read_crop_files(crops["Köln"])] == [(9, jpg(99))] and [*read_crop_files(crops["two_left"])] == [(4, jpg(200)), (6, jpg(60))]
    table = Corpus(root).check().set_index("trial")
    assert "face pictures in 2 places, of which" in table.loc["Köln", "oddities"] and "batch2" in table.loc["Köln", "oddities"]


# --- archives that cannot be believed

LONG = b"\0" * (1 << 24) + b"\0"
HOSTILE = {
    "parent": (dict(entries=[(b"../two_left/00001.jpg", jpg())]), "leads out of the archive"),
    "inside": (dict(entries=[(b"cropped_aligned/../../two_left/00001.jpg", jpg())]), "leads out of the archive"),
    "root": (dict(entries=[(b"/etc/two_left/00001.jpg", jpg())]), "leads out of the archive"),
    "drive": (dict(entries=[(b"C:\\two_left\\00001.jpg", jpg())]), "leads out of the archive"),
    "backslash": (dict(entries=[(b"..\\..\\two_left\\00001.jpg", jpg())]), "leads out of the archive"),
    "dots": (dict(entries=[(b"two_left/..", b"")]), "leads out of the archive"),
    "zero": (dict(entries=[(b"two\0_left/00001.jpg", jpg())]), "cannot be printed"),
    "bell": (dict(entries=[(b"two_left\x07/00001.jpg", jpg())]), "cannot be printed"),
    "latin": (dict(entries=[(b"K\xf6ln/00001.jpg", jpg(), UTF8, 8)]), "said to be UTF-8"),
    "encrypted": (dict(entries=[(b"two_left/00001.jpg", jpg(), 1, 8)]), "encrypted"),
    "method": (dict(entries=[(b"two_left/00001.jpg", jpg(), 0, 12)]), "packed by method 12"),
    "large": (dict(entries=[(b"two_left/00001.jpg", LONG)]), "is said to have 16777217 bytes"),
    "larger": (dict(entries=faces("two_left"), length=2**62, wide=True), "is said to have 4611686018427387904 bytes"),
    "count": (dict(entries=faces("two_left"), count=9), "directory is damaged"),
    "counts": (dict(entries=faces("two_left"), count=2**63, wide=True), "directory is damaged"),
    "size": (dict(entries=faces("two_left"), size=2**31), "not a complete zip archive"),
    "sizes": (dict(entries=faces("two_left"), size=2**62, wide=True), "not a complete zip archive"),
    "words": (b"no archive", "not a complete zip archive"), "nothing": (b"", "not a complete zip archive"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_archives_that_cannot_be_believed(root, case, capsys):
    about, fault = HOSTILE[case]
    path = root / "cropped_aligned.zip"
    path.write_bytes(about) if isinstance(about, bytes) else archive(about.pop("entries"), path, **about)
    before = sorted(root.parent.rglob("*"))
    corpus = Corpus(root)
    with pytest.raises(DataError) as error:
        corpus.trials()
    assert str(path) in str(error.value) and fault in str(error.value) and ";" in str(error.value) and "\n" not in str(error.value)
    assert main(["check", str(root)]) == 2  # and what is well is still reported
    told = capsys.readouterr()
    assert told.err == f"sage-nb: {error.value}\n" and "3 trials" in told.out and "1 unusable" in told.out
    assert sorted(root.parent.rglob("*")) == before


BOMB = b"\0" * (40 << 20)


@pytest.mark.parametrize("entries, lie", [
    ([(b"two_left/00001.jpg", BOMB)], dict(length=1000)),  # 40 MiB behind a small number
    ([(b"two_left/00001.jpg", jpg())], dict(offset=10**6)),
    ([(b"two_left/00001.jpg", jpg())], dict(offset=11)),
    ([(b"two_left/00001.jpg", jpg())], dict(length=3)),
    ([(b"two_left/00001.jpg", jpg())], dict(packed=30)),
    ([(b"two_left/00001.jpg", jpg(), 0, 0)], dict(length=2000, packed=2000)),
])
def test_a_damaged_entry_is_named(root, entries, lie):
    archive(entries, root / "cropped_aligned.zip", **lie)
    trial = next(trial for trial in Corpus(root).trials() if trial.id == "two_left")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="picture 1, at byte .* is damaged; copy the archive again"):
            read_trial(trial)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def huge_jpg():
    content = bytearray(jpg())
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    return bytes(content)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", jpg()[:-30], jpg()[:40], huge_jpg(), b"\x89PNG" + jpg(), cv2.imencode(".png", np.zeros((9, 9)))[1].tobytes(),
                                     b"\xff\xd8" + b"\xff\xe0\0\0" * 100 + b"\xff\xd9"])
def test_a_face_picture_that_is_none(root, content):
    (root / "cropped_aligned" / "Köln").mkdir(parents=True)
    (root / "cropped_aligned" / "Köln" / "00002.jpg").write_bytes(content)
    trial = Corpus(root).trials()[0]
    with pytest.raises(DataError, match="00002.jpg is no complete jpg picture .*; take the organisers' file again"):
        read_trial(trial)
    assert main(["check", str(root)]) == 1 and main(["check", str(root), "--decode"]) == 2


# --- by number, never by count

@pytest.mark.parametrize("rows", [COUNT - 3, COUNT, COUNT + 2])
def test_row_picture_and_face_of_one_number_belong_together(tmp_path, rows):
    "Faces in an archive, some missing, some beyond the end; every face tells its number, every row as well."
    video = write_video(tmp_path / "t.mp4", [wall(size=32)] * COUNT, np.arange(COUNT) / 25)
    annotation = annotate(tmp_path / "t.txt", [(-5, -5) if number in (2, 3) else (number / 100, -number / 100) for number in range(1, rows + 1)])
    length, numbers = max(rows, COUNT), [1, 3, 4, 8, 9, *range(COUNT, 20)]
    found = [number for number in numbers if number <= length]
    kept = {}
    for kind in ("folder", "archive"):
        root = tmp_path / kind
        if kind == "archive":
            archive([(f"x/t/{number:05d}.jpg".encode(), jpg(10 * number)) for number in reversed(numbers)], root / "cropped_aligned.zip")
        for number in numbers if kind == "folder" else ():
            path = root / "cropped_aligned" / "t" / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpg(10 * number))
        (root / "VA_Estimation_Challenge" / "Train_Set").mkdir(parents=True)
        (root / "VA_Estimation_Challenge" / "Train_Set" / "t.txt").write_bytes(annotation.read_bytes())
        (root / "t.mp4").write_bytes(video.read_bytes())
        [trial] = Corpus(root).trials()
        data = kept[kind] = read_trial(trial)
        assert data["frame"].tolist() == list(range(1, length + 1)) and data["frame"][data["visual_ok"]].tolist() == found
        assert np.abs(data["crops"].mean((1, 2, 3)) - 10 * data["frame"])[data["visual_ok"]].max() < 2 and not data["crops"][~data["visual_ok"]].any()
        assert data["frame"][data["valid"]].tolist() == [number for number in range(1, rows + 1) if number not in (2, 3)]
        assert data["va"][data["valid"], 0] == pytest.approx(data["frame"][data["valid"]] / 100)
        assert data["time"] == pytest.approx(np.arange(length) / 25) and data["score"].tolist() == data["visual_ok"].tolist()
        assert np.isnan(data["box"][data["visual_ok"]]).all() and not data["box"][~data["visual_ok"]].any()
    assert all(np.array_equal(kept["folder"][name], kept["archive"][name], equal_nan=name == "box") for name in kept["folder"])


def test_faces_of_two_people_are_their_own(root):
    archive(faces("two_left", [1]) + faces("two_right", [7]), root / "cropped_aligned.zip")
    for trial in Corpus(root).trials():
        if trial.side:
            data = read_trial(trial)
            assert data["frame"][data["visual_ok"]].tolist() == [1 if trial.side == "left" else 7]


def test_given_faces_are_corrupted_where_they_are(tmp_path):
    "All the way from an archive to corrupted features: no face is looked for, what was not touched stays as it was."
    root, count = tmp_path / "corpus", 75
    write_video(root / "t.mp4", [wall(size=32)] * count, np.arange(count) / 25)
    annotate(root / "VA_Estimation_Challenge" / "Validation_Set" / "t.txt", [[0.1, 0.2]] * count)
    (root / "VA_Estimation_Challenge" / "Train_Set").mkdir()
    picture = [cv2.imencode(".jpg", draw_face(wall(), mouth=number % 7 / 7)[25:137, 25:137])[1].tobytes() for number in range(count)]
    archive([(b"t/%05d.jpg" % number, picture[number - 1]) for number in range(1, count + 1) if number % 10], root / "cropped_aligned.zip")
    corpus = Corpus(root)
    prepare_corpus(corpus, tmp_path / "prepared", workers=1)
    for kind, net in (("visual", VisualEncoder()), ("audio", AudioEncoder())):
        save_encoder(tmp_path / "encoders" / f"{kind}.safetensors", net)
    encode_corpus(tmp_path / "prepared", tmp_path / "encoders", tmp_path / "store", workers=1)
    encode_corrupted(corpus, tmp_path / "prepared", tmp_path / "encoders", tmp_path / "store", tmp_path / "suite", workers=1)
    clean, _ = read_arrays(tmp_path / "store" / "t.safetensors")
    assert clean["visual_ok"].tolist() == [number % 10 > 0 for number in range(1, count + 1)]
    for family in (name for name, about in FAMILIES.items() if about.level == "media" and about.modality == "visual"):
        for severity in (1, 2, 3):
            worse, _ = read_arrays(tmp_path / "suite" / f"{family}-{severity}" / "t.safetensors")
            assert np.array_equal(worse["visual_ok"], clean["visual_ok"]), "a given face stays found"
            changed = (worse["visual"] != clean["visual"]).any(1)
            assert not changed[~worse["corrupted"]].any() and changed[worse["corrupted"] & clean["visual_ok"]].mean() > 0.9
    data = read_prepared(tmp_path / "prepared" / "t.safetensors")
    [(_, seen)] = _look_again(corpus.trials()[0], data, [("occlusion", 1)], {"occlusion": plan_stretches(data["time"], seeded(0, "test"))}, 0, tmp_path)
    same = (seen["crops"][:] == data["crops"][:]).all(-1)[seen["changed"]]
    assert 0.3 < same.mean() < 1, "an object covers a part of the picture, and the rest of it stays where it was"


# --- damaged containers

def test_more_memory_than_there_is_is_not_asked_for(tmp_path):
    late = write_video(tmp_path / "late.mp4", [wall(size=32)] * 50, np.arange(50) / 25, np.zeros(2 * 44100), pauses=[(44032, 5 * 3600)])
    with pytest.raises(DataError, match="sound is stamped over more than 4 hours"):
        read_sound(late)
    with av.open(str(tmp_path / "large.avi"), "w") as container:
        video = container.add_stream("mjpeg", rate=25, width=8208, height=8208, pix_fmt="yuvj420p")
        container.mux(video.encode(av.VideoFrame(8208, 8208, "yuvj420p")))
        container.mux(video.encode())
    for read in (video_info, lambda path: list(read_frames(path))):
        with pytest.raises(DataError, match="large.avi"):
            read(tmp_path / "large.avi")


# --- the report

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    return folder / "corpus", official_tree(folder / "corpus", videos=100, longest=600)


def test_every_planted_oddity_is_found_and_nothing_else(tree, tmp_path, capsys):
    root, planted = tree
    assert main(["check", str(root), "--json", str(tmp_path / "report.json")]) == 1
    told, report = capsys.readouterr(), json.loads((tmp_path / "report.json").read_text())
    found = {trial["trial"]: {odd["kind"] for odd in trial["oddities"]} for trial in report["trials"]}
    assert found == planted and len({kind for kinds in planted.values() for kind in kinds}) == 14
    assert report["exit_code"] == 1 and told.err == "" and {trial["problem"] for trial in report["trials"]} == {""}
    assert {split["split"]: split["trials"] for split in report["splits"]} == {"train": 62, "validation": 13, "test": 29}
    assert f"{len(planted)} trials, {sum(not kinds for kinds in planted.values())} clean" in told.out
    for kind in {kind for kinds in planted.values() for kind in kinds}:
        [line] = [line for line in told.out.splitlines() if line.strip().startswith(kind)]
        counts = [sum(kind in planted[trial["trial"]] for trial in report["trials"] if trial["split"] == split) for split in ("train", "validation", "test")]
        assert line.split(kind)[1].split()[:4] == [*map(str, counts), "0"]


def test_the_report_is_the_same_on_one_core_and_on_two(tree):
    one, two = (Corpus(tree[0]).check(workers=workers) for workers in (1, 2))
    assert one.equals(two)


def test_the_summary_adds_up(tree):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus = Corpus(tree[0], dev_groups=5, calibration_groups=5)
        table = corpus.check()
        there, odd = summarise(table)
    assert there.split.tolist() == ["train", "dev", "calibration", "validation", "test"]
    assert (there.clean + there.odd + there.broken).tolist() == there.trials.tolist() and there.pictures.sum() == table.frames.sum()
    assert odd.drop(columns=["odd", "example"]).to_numpy().sum() == table.odd.map(len).sum()
    assert there.faces.between(0.85, 0.95).all() and there.labelled[:4].between(0.9, 1).all() and np.isnan(there.labelled[4])


def test_broken_and_idle_things_are_in_the_report(root, tmp_path):
    archive(faces("two_left") + faces("stranger"), root / "cropped_aligned.zip")
    (root / "cropped_aligned_2.zip").write_bytes(b"words")
    (root / "videos" / "spare.mp4").hardlink_to(root / "videos" / "two.mp4")
    annotate(root / "VA_Estimation_Challenge" / "Train_Set" / "gone.txt", [[0, 0]])
    assert main(["check", str(root), "--json", str(tmp_path / "r.json")]) == 2
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["exit_code"] == 2 and report["splits"][0]["broken"] == 1
    named = {row["trial"] or row["video"]: row for row in report["trials"]}
    assert "no video for this trial" in named["gone"]["problem"] and named["gone"]["frames"] is None
    idle = {row["video"]: [odd["text"] for odd in row["oddities"]] for row in report["trials"] if not row["trial"] and not row["problem"]}
    assert idle == {"videos/spare.mp4": ["no trial belongs to this video"], "cropped_aligned.zip (stranger)": ["no trial belongs to these face pictures"]}
    [fault] = [row["problem"] for row in report["trials"] if row["problem"] and not row["trial"]]
    assert "cropped_aligned_2.zip" in fault


@pytest.mark.parametrize("place, name", [("VA_Estimation_Challenge/Train_Set", b"\xff\xfe.txt"), ("VA_Estimation_Challenge/Train_Set", b"line\nend.txt"),
                                         ("videos", b"\x1b[2J.mp4"), ("cropped_aligned/K\xf6ln\x07", b"00001.jpg")])
def test_names_that_are_no_text(root, place, name, capfd):
    (root / place).mkdir(parents=True, exist_ok=True)
    open(str(root / place).encode() + b"/" + name, "w").close()
    assert main(["check", str(root)]) == 2
    told = capfd.readouterr()
    assert "cannot be printed; rename it" in told.err and len(told.err.splitlines()) == 1 and told.err.strip().isprintable() and not told.out


def test_what_only_decoding_shows(root, tmp_path):
    damaged = bytearray(write_video(tmp_path / "d.mp4", talking(30), np.arange(30) / 25).read_bytes())
    with av.open(str(tmp_path / "d.mp4")) as container:
        hit = [packet for packet in container.demux(video=0) if packet.size][15]
        damaged[hit.pos : hit.pos + hit.size] = b"\xff" * hit.size
    (root / "videos" / "Köln.mp4").unlink()
    (root / "videos" / "Köln.mp4").write_bytes(damaged)
    annotate(root / "VA_Estimation_Challenge" / "Train_Set" / "Köln.txt", [[0, 0]] * 30)
    corpus = Corpus(root)
    assert (corpus.check().problem == "").all()
    problems = corpus.check(look_closely).set_index("trial").problem
    assert "decoding stops after picture" in problems["Köln"] and problems["two_left"] == problems["two_right"] == ""


def test_a_face_model_reaches_the_trial(tmp_path):
    video = write_video(tmp_path / "t.mp4", [draw_face(wall())] * 3, np.arange(3) / 25)
    trial = Trial("t", "train", video, None, None, "s", "t")
    with pytest.raises(DataError, match="no such face model"):
        read_trial(trial, face_model=tmp_path / "absent.onnx")
    assert read_trial(replace(trial, side="left"))["visual_ok"].shape == (3,)
