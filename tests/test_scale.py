"What grows with a video's length or a corpus's size: memory does not, blocks change nothing, and one broken trial does not stop the others."
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from clips import annotate, beeps, talking, write_video
from conftest import ROOT, environment

from sage_nb import encoders, features
from sage_nb.affwild2 import Corpus
from sage_nb.backbones import save_encoder
from sage_nb.core import DataError, read_arrays, read_json, write_arrays, write_json
from sage_nb.encoders import AUDIO_RATE, AudioEncoder, VisualEncoder
from sage_nb.features import encode_corpus, encode_trial, load_sequences, observation_cues, prepare_corpus, read_prepared
from sage_nb.windows import collate

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
STATUS = "import re\ndef status(name): return int(re.search(name + r':\\s*(\\d+) kB', open('/proc/self/status').read())[1]) * 1024 / 1e6\n"


def in_processes(code: str, arguments: list[tuple]) -> list[list[float]]:
    "What each of the processes, which run at a time, prints: megabytes. What they free goes back to the system at once, so that none of it counts."
    settings = environment(ROOT, OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="65536")
    running = [subprocess.Popen([sys.executable, "-c", STATUS + code, *map(str, given)], env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for given in arguments]
    found = [process.communicate() for process in running]
    assert all(process.returncode == 0 for process in running), found
    return [[float(number) for number in said.split()] for said, _ in found]


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    "A folder with small encoders that nobody trained."
    folder = tmp_path_factory.mktemp("nets")
    torch.manual_seed(0)
    save_encoder(folder / "visual.safetensors", VisualEncoder())
    save_encoder(folder / "audio.safetensors", AudioEncoder())
    return folder


def make_corpus(root, **frames):
    "A corpus of one trial a name, of so many small pictures."
    faces = [cv2.resize(image, (96, 96), interpolation=cv2.INTER_AREA) for image in talking(30)]
    for name, count in frames.items():
        noise = np.random.default_rng(0).uniform(-0.3, 0.3, count * 8000 // 30)
        write_video(root / "videos" / f"{name}.avi", [faces[k % 30] for k in range(count)], np.arange(count) / 30, noise, rate=8000)
        annotate(root / "VA_Estimation_Challenge/Train_Set" / f"{name}.txt", [(0.1, 0.2)] * count)
    return root


EXTRACT = """import sys
from pathlib import Path
from sage_nb.affwild2 import Corpus
from sage_nb.features import encode_corpus, prepare_corpus
from sage_nb.suite import encode_copies
root, nets = map(Path, sys.argv[1:])
prepare_corpus(Corpus(root), root / "prepared", workers=1)
print(status("VmHWM"))
encode_corpus(root / "prepared", nets, root / "store", workers=1)
print(status("VmHWM"))
encode_copies(root / "prepared", nets, root / "store", ("train",), workers=1)
print(status("VmHWM"))
"""


@linux_only
def test_memory_does_not_depend_on_the_length_of_a_video(tmp_path, nets):
    long, short = (make_corpus(tmp_path / str(count), t=count, other=100) for count in (6000, 400))
    long_peaks, short_peaks = in_processes(EXTRACT, [(long, nets), (short, nets)])
    stored, _ = read_arrays(long / "store/copies/t.safetensors")
    assert stored["visual"].shape == (6000, 64) and stored["corrupted"].any(0).all() and stored["visual_ok"].mean() > 0.9
    more = np.subtract(long_peaks, short_peaks)
    assert len(more) == 3 and more.max() < 30, (long_peaks, short_peaks)


# --- reading

def write_store(folder, trials, frames):
    "A store of random features of the lineage's widths, with copies."
    rng, everywhere = np.random.default_rng(0), np.ones(frames, bool)
    for name in map(str, range(trials)):
        visual, audio, va, cues = (rng.standard_normal((frames, dim), np.float32) for dim in (512, 128, 2, 11))
        copied = dict(visual=visual, audio=audio, cues=cues, visual_ok=everywhere, audio_ok=everywhere)
        write_arrays(folder / f"{name}.safetensors", copied | dict(va=np.tanh(va), valid=everywhere), dict(group=name))
        write_arrays(folder / f"copies/{name}.safetensors", copied | dict(corrupted=np.ones((frames, 2), bool)))
    write_json(folder / "index.json", {str(trial): dict(split="train") for trial in range(trials)})
    return folder


TRAIN = """import sys, threading, time
from sage_nb.baselines import build_model
from sage_nb.features import load_sequences
from sage_nb.training import fit
over, most = threading.Event(), [0]
def watch():
    while not over.wait(0.002):
        most[0] = max(most[0], status("RssAnon"))
threading.Thread(target=watch, daemon=True).start()
val = load_sequences(sys.argv[1], "train")
def peak(store):
    most[0] = 0
    model = build_model("sage", 512, 128, 11, visual_width=16, audio_width=16)
    fit(model, load_sequences(store, "train", copies=True), val[:1], val[1:2], epochs=2, refine_steps=10, warmup=0.0)
    return most[0]
peak(sys.argv[1])
before = peak(sys.argv[1])
print(peak(sys.argv[2]) - before)
over.set()
"""


@linux_only
def test_training_reads_a_store_without_loading_it(tmp_path):
    small, large = write_store(tmp_path / "small", 8, 700), write_store(tmp_path / "large", 8, 4000)
    size = sum(path.stat().st_size for path in large.rglob("*.safetensors")) / 1e6
    [[more]] = in_processes(TRAIN, [(small, large)])  # batches are as large in both
    assert size > 160 and more < size / 8, (more, size)


def test_windows_of_a_half_precision_store_are_those_of_the_full_one(tmp_path, nets):
    prepared, full, half = (tmp_path / name for name in ("prepared", "full", "half"))
    prepare_corpus(Corpus(make_corpus(tmp_path / "corpus", t=90)), prepared, workers=1)
    for store in (full, half):
        encode_corpus(prepared, nets, store, workers=1, half=store == half)
    stored = {store: load_sequences(store, "train") for store in (full, half)}
    assert [stored[store][0].visual.dtype for store in (full, half)] == [np.float32, np.float16]
    one, other = (collate(stored[store], [(0, 0), (0, 50)], 40) for store in (full, half))
    for name in ("visual", "audio"):
        exact, rounded = getattr(one, name), getattr(other, name)
        assert rounded.dtype == torch.float32 and exact.abs().sum() > 0
        assert ((exact - rounded).abs() <= exact.abs() * 2**-11 + 2**-25).all() and not torch.equal(exact, rounded)
    for exact, same in zip(one[2:9], other[2:9]):  # all but the features
        assert torch.equal(exact.nan_to_num(), same.nan_to_num())


# --- blocks

@pytest.fixture(scope="module")
def three_minutes():
    "A made-up trial: faces that move, a voice that comes and goes, gaps in both."
    rng, frames = np.random.default_rng(0), 180 * 30
    faces = np.stack([cv2.resize(image, (48, 48), interpolation=cv2.INTER_AREA) for image in talking(40)])
    crops = (faces[np.arange(frames) % 40] * rng.uniform(0.5, 1, (frames, 1, 1, 1))).astype(np.uint8)
    sound = rng.standard_normal(170 * AUDIO_RATE) * (0.02 + 0.2 * (np.sin(np.arange(170 * AUDIO_RATE) / 9000) > 0))
    ok = np.arange(frames) % 400 > 30
    crops[~ok] = 0
    time = 0.30173 + np.arange(frames) * 1.001 / 30  # never on a sample or between two embeddings, where rounding decides which is nearer
    return dict(crops=crops, sound=sound.clip(-1, 1).astype(np.float32), sound_start=4.1, has_sound=True, time=time, visual_ok=ok,
                audio_ok=(time > 4.1) & (time < 174), score=np.where(ok, rng.uniform(0.6, 1, frames), 0).astype(np.float32),
                va=np.zeros((frames, 2), np.float32), valid=ok, frame=np.arange(1, frames + 1, dtype=np.int32))


def test_extraction_in_blocks_is_extraction_in_one_piece(tmp_path, three_minutes, nets, monkeypatch):
    meta = ("sound_start", "has_sound")
    write_arrays(tmp_path / "t.safetensors", {name: value for name, value in three_minutes.items() if name not in meta}, {name: three_minutes[name] for name in meta})
    see, hear = features.load_encoders(nets)
    assert see.batch < 500 and hear.chunk < 60
    blocks = encode_trial(read_prepared(tmp_path / "t.safetensors"), see, hear, scratch=tmp_path)
    whole, pieces = encoders.sound_blocks, []

    def in_one_piece(moments, samples, margin, seconds=30.0):
        pieces.append(list(whole(moments, samples, margin, 1e6)))
        return pieces[-1]

    for module in (encoders, features):
        monkeypatch.setattr(module, "sound_blocks", in_one_piece)
    see.batch = len(three_minutes["time"])
    piece = encode_trial(three_minutes, see, hear)
    assert len(pieces) == 3 and all(part == [(slice(0, 5400), 0, 170 * AUDIO_RATE)] for part in pieces)
    for name in ("visual", "audio", "cues"):
        assert np.nan_to_num(piece[name]).any(), name
        np.testing.assert_allclose(blocks[name][:], piece[name], rtol=0, atol=1e-4, err_msg=name)
    np.testing.assert_array_equal(blocks["audio_ok"], piece["audio_ok"])
    assert piece["audio_ok"].sum() > 5000


def test_cues_of_pictures_in_blocks_are_those_in_one_piece(three_minutes):
    ok = three_minutes["visual_ok"]
    at_once = features.picture_cues(three_minutes["crops"], ok, features.RunningMean(30 / 1.001))
    cues = observation_cues(three_minutes)
    named = [features.CUES.index(name) for name in ("sharpness", "brightness", "change", "upper", "lower")]
    np.testing.assert_allclose(cues[ok][:, named], at_once[ok, :5], rtol=0, atol=1e-4)
    assert np.isnan(cues[~ok][:, named]).all()


# --- broken trials

@pytest.fixture
def damaged(tmp_path):
    "A corpus of three trials of which one video is cut off, and what to mend it with."
    root = make_corpus(tmp_path / "corpus", a=40, b=40, c=40)
    video = root / "videos/b.avi"
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 2])
    return root, lambda: video.write_bytes(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_trial_does_not_stop_the_others(damaged, tmp_path, workers):
    root, mend = damaged
    out = tmp_path / "prepared"
    with pytest.raises(DataError, match=r"b\.avi: .*; copy the file again$"):
        prepare_corpus(Corpus(root), out, workers=workers)
    assert names(out) == ["a.safetensors", "broken.json", "c.safetensors"]
    assert list(read_json(out / "broken.json")) == ["b"] and "b.avi" in read_json(out / "broken.json")["b"]
    before = (out / "a.safetensors").stat().st_mtime_ns
    mend()
    assert list(prepare_corpus(Corpus(root), out, workers=1)) == ["a", "b", "c"]
    assert names(out) == ["a.safetensors", "b.safetensors", "c.safetensors", "index.json"]
    assert (out / "a.safetensors").stat().st_mtime_ns == before


def test_a_broken_trial_can_be_left_out(damaged, tmp_path, nets, capsys):
    root, mend = damaged
    out, store = tmp_path / "prepared", tmp_path / "store"
    assert list(prepare_corpus(Corpus(root), out, workers=1, skip_broken=True)) == list(read_json(out / "index.json")) == ["a", "c"]
    assert f"1 of 3 trials are broken and left out: see {out / 'broken.json'}" in capsys.readouterr().err
    encode_corpus(out, nets, store, workers=1)
    assert names(store) == ["a.safetensors", "c.safetensors", "index.json"]
    mend()
    prepare_corpus(Corpus(root), out, workers=1, skip_broken=True)
    encode_corpus(out, nets, store, workers=1)
    assert list(read_json(store / "index.json")) == ["a", "b", "c"] and not (out / "broken.json").exists()


def test_broken_trials_in_encoding(damaged, tmp_path, nets):
    root, mend = damaged
    mend()
    out, store = tmp_path / "prepared", tmp_path / "store"
    prepare_corpus(Corpus(root), out, workers=1)
    saved = {name: (out / f"{name}.safetensors").read_bytes() for name in "ab"}
    for name in "ab":
        (out / f"{name}.safetensors").write_bytes(saved[name][:1000])
    with pytest.raises(DataError, match=r"a\.safetensors: .* \(and 1 more broken trials: see .*broken\.json\)$"):
        encode_corpus(out, nets, store, workers=1)
    assert names(store) == ["broken.json", "c.safetensors"] and list(read_json(store / "broken.json")) == ["a", "b"]
    (out / "a.safetensors").write_bytes(saved["a"])
    encode_corpus(out, nets, store, workers=1, skip_broken=True)
    assert list(read_json(store / "index.json")) == ["a", "c"] and list(read_json(store / "broken.json")) == ["b"]
    assert [sequence.id for sequence in load_sequences(store, "train")] == ["a", "c"]
    (out / "b.safetensors").write_bytes(saved["b"])
    encode_corpus(out, nets, store, workers=1)
    assert names(store) == ["a.safetensors", "b.safetensors", "c.safetensors", "index.json"]
