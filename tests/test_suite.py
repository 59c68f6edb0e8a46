"""Copies that are corrupted on purpose, and the cues that should notice: each changes what it says and nothing else."""
import tracemalloc

import cv2
import numpy as np
import pytest
import torch
from clips import annotate, talking, write_video

from sage_nb import corruption, suite
from sage_nb.affwild2 import Corpus
from sage_nb.core import DataError, read_arrays, write_arrays, write_json
from sage_nb.backbones import save_encoder
from sage_nb.encoders import AudioEncoder, VisualEncoder
from sage_nb.features import CUE_OWNERS, CUES, encode_corpus, load_sequences, observation_cues
from sage_nb.suite import encode_copies, encode_corrupted

FPS, COUNT, RATE = 25, 260, 16000
TIMES = np.arange(COUNT) / FPS
OWNER = np.array(list(CUE_OWNERS.lower()))
PEOPLE = dict(a=("train", "a"), b=("train", "b"), c=("train", "c"), d=("train", "a"), e=("calibration", "e"), f=("validation", "f"))  # split, group


def voice(pitch, seconds=COUNT / FPS, tilt=1.0, seed=0):
    "A buzz with a syllable three times a second."
    time = np.arange(round(seconds * RATE)) / RATE
    buzz = sum(np.sin(2 * np.pi * pitch * k * time) / k**tilt for k in range(1, 16))
    breath = 0.05 * np.random.default_rng(seed).standard_normal(len(time))
    return (0.05 * (buzz + breath) * (1.2 + np.sin(2 * np.pi * 3 * time))).astype(np.float32)


def look(shift):
    "A talking face, small; everyone has a colour of their own."
    crops = np.stack([cv2.resize(image[30:130, 30:130], (48, 48), interpolation=cv2.INTER_AREA) for image in talking(60)])
    return np.resize((crops.astype(int) + np.array([shift, 0, -shift])).clip(0, 255).astype(np.uint8), (COUNT, 48, 48, 3))


def trial(number=0):
    return dict(crops=look(8 * number), visual_ok=np.ones(COUNT, bool), score=np.full(COUNT, 9, np.float32), box=np.ones((COUNT, 4), np.float32),
                va=np.zeros((COUNT, 2), np.float32),
                valid=np.arange(COUNT) % 7 > 0, frame=np.arange(1, COUNT + 1, dtype=np.int32), time=TIMES, sound=voice(110 + 30 * number, seed=number),
                audio_ok=np.ones(COUNT, bool))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Six prepared and encoded trials: b's face is lost for a second, c has no sound, d is of a's group, e is alone in its split."
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("copies")
    for number, name in enumerate(PEOPLE):
        data, heard = trial(number), name != "c"
        if name == "b":
            data["visual_ok"][40:65], data["crops"][40:65] = False, 0
        if not heard:
            data["sound"], data["audio_ok"] = np.zeros(0, np.float32), np.zeros(COUNT, bool)
        write_arrays(root / "prepared" / f"{name}.safetensors", data, dict(sound_start=0.0, has_sound=heard))
    write_json(root / "prepared/index.json", {name: dict(split=split, group=group, subject=name) for name, (split, group) in PEOPLE.items()})
    torch.manual_seed(0)
    for kind, net in (("visual", VisualEncoder()), ("audio", AudioEncoder())):
        save_encoder(root / "encoders" / f"{kind}.safetensors", net)
    encode_corpus(root / "prepared", root / "encoders", root / "store", workers=1)
    make_copies(root)
    return root


def make_copies(root, store="store", **settings):
    encode_copies(root / "prepared", root / "encoders", root / store, workers=1, **settings)


def fresh(root, name):
    "A feature store of its own, without copies."
    encode_corpus(root / "prepared", root / "encoders", root / name, workers=1)
    return root / name


# --- copies

def test_a_copy_changes_what_it_says(made):
    assert sorted(path.stem for path in (made / "store/copies").glob("*.safetensors")) == ["a", "b", "c", "d", "e"]
    for split in ("train", "calibration"):
        for clean, s in zip(load_sequences(made / "store", split), load_sequences(made / "store", split, copies=True)):
            assert clean.copy is None and clean.corrupted is None and np.array_equal(clean.visual, s.visual)
            copy, mask = s.copy, s.copy.corrupted
            assert copy.va is s.va and copy.valid is s.valid and (copy.id, copy.group, copy.copy) == (s.id, s.group, None)
            assert np.array_equal(copy.visual_ok, s.visual_ok) and np.array_equal(copy.audio_ok, s.audio_ok)
            assert mask.shape == (COUNT, 2) and mask.dtype == bool and not mask[~s.visual_ok, 0].any()
            changed = (copy.visual != s.visual).any(1)
            assert not changed[~mask[:, 0]].any() and changed[mask[:, 0]].mean() > 0.95
            assert 0.35 < mask[:, 0].mean() < 0.55
            if s.id == "c":
                assert not mask[:, 1].any() and np.array_equal(copy.audio, s.audio)
                assert np.array_equal(copy.cues[:, OWNER == "a"], s.cues[:, OWNER == "a"], equal_nan=True)
                continue
            assert 0.45 < mask[:, 1].mean() < 0.55
            near = np.convolve(mask[:, 1], np.ones(17), "same") > 0  # the encoder hears a third of a second around a frame
            changed = (copy.audio != s.audio).any(1)
            assert not changed[~near].any() and changed[mask[:, 1]].mean() > 0.95


def test_cues_of_a_copy_are_those_of_what_is_observed(made):
    for s in load_sequences(made / "store", "train", copies=True):
        before, after = (np.where(np.isnan(x), 0, x) for x in (s.cues, s.copy.cues))
        local = [CUES.index(name) for name in ("sharpness", "brightness", "score")]  # these have no memory
        outside = ~s.copy.corrupted[:, 0]
        assert np.array_equal(before[outside][:, local], after[outside][:, local]) and not np.array_equal(before[:, local], after[:, local])
        assert np.isnan(s.copy.cues[~s.visual_ok][:, OWNER == "v"]).all()


def test_stretches_of_sight_and_sound_are_independent(made):
    masks = [s.copy.corrupted for s in load_sequences(made / "store", "train", copies=True) if s.id != "c"]
    both = np.concatenate(masks)
    assert all(both[both[:, 0] == sight][:, 1].mean() not in (0, 1) for sight in (False, True))
    assert len({mask[:, m].tobytes() for mask in masks for m in (0, 1)}) == 2 * len(masks)
    edges = np.flatnonzero(np.diff(np.r_[0, masks[0][:, 1].astype(int), 0]))
    assert 2 <= len(edges) // 2 <= 3 and (np.diff(edges)[::2] >= 2 * FPS - 1).all() and (np.diff(edges)[::2] <= 4 * FPS + 1).all()


def test_the_same_seed_gives_the_same_bytes_and_work_goes_on_where_it_stopped(made):
    paths = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (made / "store/copies").glob("*.safetensors")}
    gone = made / "store/copies/b.safetensors"
    gone.unlink()
    make_copies(made)
    assert all(path.read_bytes() == content and (path == gone or path.stat().st_mtime_ns == time) for path, (time, content) in paths.items())
    fresh(made, "again")
    make_copies(made, "again")
    assert all((made / "again/copies" / path.name).read_bytes() == content for path, (_, content) in paths.items())


def test_another_seed_gives_other_copies_and_does_not_mix(made):
    with pytest.raises(DataError, match="copies of another seed"):
        make_copies(made, seed=1)
    fresh(made, "other")
    make_copies(made, "other", seed=1)
    one, two = (load_sequences(made / store, "train", copies=True)[0].copy for store in ("store", "other"))
    assert not np.array_equal(one.corrupted, two.corrupted)


def test_a_split_that_is_not_there_is_refused(made):
    with pytest.raises(DataError, match="no trial of split 'dev'; there are calibration, train, validation"):
        make_copies(made, splits=("train", "dev"))


def test_trials_without_a_copy_have_none(made):
    assert [s.copy for s in load_sequences(made / "store", "validation", copies=True)] == [None]


def test_somebody_else_is_of_another_group_of_the_same_split(made, monkeypatch):
    read = []
    monkeypatch.setattr(suite, "_encode_copy", lambda task: read.append(task))
    make_copies(made)
    assert {task[0]: task[2:4] for task in read} == dict(
        a=(["b", "c"], ["b"]), b=(["a", "c", "d"], ["a", "d"]), c=(["a", "b", "d"], ["a", "b", "d"]), d=(["b", "c"], ["b"]), e=([], []))


def test_somebody_else_is_looked_at_anew_when_prepared_again(tmp_path):
    path = tmp_path / "a.safetensors"
    for found, sound in (([1, 2], 0.1 * voice(120)), ([4], 0.4 * voice(120))):
        ok = np.isin(np.arange(COUNT), found)
        write_arrays(path, dict(crops=look(found[0]), visual_ok=ok, sound=sound))
        crops, places = suite._face_of(*suite._as_it_is(path))
        rows, loud = suite._voice_of(*suite._as_it_is(path))
        assert np.array_equal(crops[:], look(found[0])) and places.tolist() == found
        assert np.array_equal(rows[:], sound) and loud == suite._loudness(sound)
    assert suite._voice_of(*suite._as_it_is(path))[0] is rows  # the same file is read once
    assert suite._face_of.cache_info().maxsize and suite._voice_of.cache_info().maxsize


# --- what happens in a stretch

FACES, OTHER = look(0)[:30], look(60)[:7]
SOMEBODY = (OTHER, np.arange(len(OTHER)))


def what_happened(crops) -> str:
    changed = (crops != FACES).any(-1)
    rows, columns = np.flatnonzero(changed.any((0, 2))), np.flatnonzero(changed.any((0, 1)))
    part = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if (crops[part] == crops[0, rows[0], columns[0]]).all():
        return "object"
    if any((crops[0][part[1:]] == other[part[1:]]).all() for other in OTHER):
        return "face"
    detail = [np.mean([cv2.Laplacian(c, cv2.CV_32F).var() for c in x]) for x in (FACES, crops)]
    return "blur" if detail[1] < 0.6 * detail[0] and abs(crops.mean() - FACES.mean()) < 1 else "light"


def test_pictures_meet_four_things_and_the_light_is_never_dark():
    before, count, low = FACES.copy(), {}, []
    for number in range(120):
        crops = suite._corrupt_faces(FACES, np.random.default_rng(number), SOMEBODY)
        assert crops.shape == FACES.shape and crops.dtype == np.uint8
        kind = what_happened(crops)
        count[kind] = count.get(kind, 0) + 1
        changed = (crops != FACES).any(-1).mean((1, 2))
        if kind in ("object", "face"):
            assert changed.max() < 0.75 and changed.min() > 0.05
            low.append(np.flatnonzero((crops != FACES).any((0, 2, 3)))[0] >= 18)
        if kind == "light":
            assert crops.mean() > 0.58 * FACES.mean()  # of which rounding down takes half a level
        assert np.array_equal(crops, suite._corrupt_faces(FACES, np.random.default_rng(number), SOMEBODY))
    assert set(count) == {"object", "face", "blur", "light"} and min(count.values()) > 15
    assert 0.5 < np.mean(low) < 0.95 and np.array_equal(FACES, before)
    alone = {what_happened(suite._corrupt_faces(FACES, np.random.default_rng(number), None)) for number in range(40)}
    assert alone == {"object", "blur", "light"}


def test_a_pasted_face_moves():
    pasted = [crops for number in range(20) if what_happened(crops := suite._corrupt_faces(FACES, np.random.default_rng(number), SOMEBODY)) == "face"]
    assert all((crops[0] != crops[3]).any() and len(crops) > len(OTHER) for crops in pasted) and pasted


def test_sounds_meet_four_things():
    own, other = 0.5 * voice(120, 3.0), 0.01 * voice(300, 2.0, seed=1)
    loud, before, count = suite._loudness(own), own.copy(), dict(mute=0, clipping=0, babble=0, noise=0)
    middle = slice(RATE // 2, -RATE // 2)
    for number in range(150):
        out = suite._corrupt_voice(own, loud, np.random.default_rng(number), (other, suite._loudness(other)))
        assert out.dtype == np.float32 and out.shape == own.shape and np.abs(out).max() <= 1
        assert abs(out[0] - own[0]) < 0.01 and abs(out[-1] - own[-1]) < 0.01  # no click
        level = np.sqrt((out[middle] ** 2).mean())
        x, y = out[middle], np.roll(np.resize(other, len(own)), 0)[middle]
        if not out[middle].any():
            kind = "mute"
        elif np.abs(x).max() / level < 0.8 * np.abs(own[middle]).max() / np.sqrt((own[middle] ** 2).mean()) and np.corrcoef(np.sign(x), np.sign(own[middle]))[0, 1] > 0.99:
            kind = "clipping"
            assert np.sqrt((out**2).mean()) == pytest.approx(np.sqrt((own**2).mean()), rel=0.02)
        else:
            spectrum = np.abs(np.fft.rfft(x * np.hanning(len(x)))) ** 2
            hertz = np.fft.rfftfreq(len(x), 1 / RATE)
            kind = "babble" if spectrum[np.abs(hertz - 300) < 8].sum() > 5 * spectrum[np.abs(hertz - 270) < 8].sum() else "noise"
        count[kind] += 1
        if kind == "noise":
            assert 0.1 < np.sqrt(((out - own)[middle] ** 2).mean()) / loud < 2.2
        if kind == "babble":
            assert 0.5 < level / loud < 2.5
    assert 55 < count["babble"] < 110 and 20 < count["noise"] < 60 and count["clipping"] > 5 and count["mute"] > 5
    assert np.array_equal(own, before)
    alone = [suite._corrupt_voice(own, loud, np.random.default_rng(number), None) for number in range(40)]
    assert 0 < sum(not x[middle].any() for x in alone) < 20


def test_silence_can_be_corrupted_too():
    silence = np.zeros(RATE, np.float32)
    for number in range(30):
        loud = suite._loudness(silence)
        out = suite._corrupt_voice(silence, loud, np.random.default_rng(number), (silence, loud))
        assert np.isfinite(out).all() and np.abs(out).max() < 0.01


def test_loudness_is_that_of_speech_not_of_pauses():
    tone = 0.1 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE).astype(np.float32)
    assert suite._loudness(np.r_[tone, np.zeros(4 * RATE, np.float32)]) == pytest.approx(0.1 / np.sqrt(2), rel=0.02)


def test_a_long_sound_is_corrupted_as_a_whole_one(tmp_path, monkeypatch):
    sound, others = voice(120, 2.0), [voice(200, 0.7, seed=1), np.zeros(50, np.float32), voice(300, 3.0, seed=2)]
    active = np.arange(len(sound)) // 3001 % 2 == 0
    for family in ("noise", "babble", "clipping"):
        made = []
        for block in (1 << 19, 997, 100):  # the last ones shorter than a fade
            monkeypatch.setattr(corruption, "_BLOCK", block)
            for folder in (None, tmp_path):
                made.append(corruption.corrupt_sound(sound, RATE, active, family, 2, np.random.default_rng(0), others, folder)[:])
        assert np.array_equal(made[0], made[1]) and made[0].dtype == np.float32 and not np.array_equal(made[0], sound)
        assert all(np.allclose(made[0], other, atol=1e-7) for other in made[2:]), family


# --- cues

def cues(**changes):
    return dict(zip(CUES, observation_cues({**trial(), "sound_start": 0.0, **changes}).T))


def test_every_cue_has_an_owner_and_is_missing_with_it():
    assert len(CUES) == len(CUE_OWNERS) == len(set(CUES)) == 11
    lost = np.arange(COUNT) < 50
    for owners, changes in (("vb", dict(visual_ok=~lost)), ("ab", dict(audio_ok=~lost))):
        seen = cues(**changes)
        for name, owner in zip(CUES, CUE_OWNERS.lower()):
            assert np.isnan(seen[name][lost]).all() == (owner in owners), name


def still(change=lambda crops: None):
    crops = np.full((COUNT, 48, 48, 3), 120, np.uint8)
    change(crops)
    return cues(crops=crops)


def test_a_hand_before_the_mouth_moves_lower_and_one_before_the_eyes_upper():
    def hand(rows):
        def change(crops):
            crops[150:, rows, 20:28] = 60  # as large in both halves
        return still(change)

    below, above = hand(slice(36, 48)), hand(slice(0, 12))
    for seen, here, there in ((below, "lower", "upper"), (above, "upper", "lower")):
        assert seen[here][:150].max() < 1e-6 and seen[here][150] > 0.02 and seen[here][150] > 2 * seen[there][150]  # which feels the darker mean
        assert seen["change"][150] > 0.005 and (np.diff(seen[here][150:]) < 0).all()  # one gets used to it
    assert below["lower"] == pytest.approx(above["upper"])


def test_more_or_less_light_moves_neither_much():
    def lamp(crops):
        crops[150:] = 180

    seen = still(lamp)
    assert seen["change"][150] > 0.2 and max(seen["upper"].max(), seen["lower"].max()) < 0.02


def test_timbre_jumps_when_the_voice_changes_and_not_when_it_grows():
    one, two = voice(120, tilt=1.5), voice(210, tilt=0.3, seed=1)
    turn = np.arange(len(one)) < len(one) / 2
    louder, other = (cues(sound=np.where(turn, one, x).astype(np.float32))["timbre"] for x in (2.5 * one, two))
    after = slice(COUNT // 2 + 8, COUNT // 2 + 58)
    assert other[20 : COUNT // 2 - 8].max() < 1.5 and louder[20:].max() < 2.5
    assert other[after].min() > 2 * louder[after].max()
    assert np.array_equal(other[: COUNT // 2 - 10], louder[: COUNT // 2 - 10])  # it looks a third of a second ahead, no further


def test_there_is_no_timbre_where_nobody_is_heard():
    sound = voice(120)
    sound[4 * RATE : 7 * RATE] *= 0.001
    seen = cues(sound=sound)
    quiet = (TIMES > 4.4) & (TIMES < 6.6)
    assert np.isnan(seen["timbre"][quiet]).all() and np.isfinite(seen["level"]).all()
    assert np.isfinite(seen["timbre"][(TIMES < 3.9) | (TIMES > 7.1)]).all()


def test_cues_of_a_clip_without_sound_and_of_one_that_starts_late():
    none = cues(sound=np.zeros(0, np.float32), audio_ok=np.zeros(COUNT, bool))
    assert np.isnan(none["timbre"]).all() and np.isfinite(none["upper"]).all()
    late = cues(sound=voice(120, 4.0), sound_start=3.0, audio_ok=(TIMES >= 3) & (TIMES < 7))
    alone = cues(sound=np.r_[np.zeros(3 * RATE, np.float32), voice(120, 4.0)], audio_ok=(TIMES >= 3) & (TIMES < 7))
    assert late["timbre"] == pytest.approx(alone["timbre"], nan_ok=True) and np.isfinite(late["timbre"][80:170]).all()


# --- memory

FEW = ("occlusion-1", "babble-1")  # sight and sound; the others are said to be there already


def make_long(root, count, net):
    "Two people's videos of so many small pictures, prepared and encoded by hand, with wide features."
    faces = [cv2.resize(image, (96, 96), interpolation=cv2.INTER_AREA) for image in talking(30)]
    everywhere, rng = np.ones(count, bool), np.random.default_rng(0)
    crops = np.stack([cv2.resize(face, (48, 48), interpolation=cv2.INTER_AREA) for face in faces])[np.arange(count) % 30]
    for name in "tu":
        write_video(root / "videos" / f"{name}.avi", [faces[k % 30] for k in range(count)], np.arange(count) / 30)
        annotate(root / "VA_Estimation_Challenge/Validation_Set" / f"{name}.txt", [(0.1, 0.2)] * count)
        sound = rng.uniform(-0.3, 0.3, count * RATE // 30).astype(np.float32)
        seen = dict(visual_ok=everywhere, audio_ok=everywhere)
        write_arrays(root / "prepared" / f"{name}.safetensors", seen | dict(
            crops=crops, score=np.ones(count, np.float32), box=np.full((count, 4), 40, np.float32), time=np.arange(count) / 30, sound=sound),
            dict(sound_start=0.0, has_sound=True))
        wide = {kind: rng.standard_normal((count, 64), np.float32) for kind in ("visual", "audio")}
        write_arrays(root / "store" / f"{name}.safetensors", seen | wide, dict(group=name))
    write_json(root / "store/index.json", {name: dict(split="validation", group=name) for name in "tu"})
    for family, about in corruption.FAMILIES.items():
        for severity in (1, 2, 3) if about.level == "media" else ():
            for name in "tu":
                if name == "u" or f"{family}-{severity}" not in FEW:
                    write_arrays(root / "suite" / f"{family}-{severity}" / f"{name}.safetensors", {})
    for kind, encoder in net.items():
        save_encoder(root / "encoders" / f"{kind}.safetensors", encoder)
    return root


def test_memory_does_not_depend_on_the_length_of_a_corrupted_video(tmp_path):
    torch.manual_seed(0)
    net, peaks = dict(visual=VisualEncoder(), audio=AudioEncoder()), []
    for count in (1400, 2800):  # the short one is longer than any block
        root = make_long(tmp_path / str(count), count, net)
        tracemalloc.start()  # counts arrays to the byte, and not what the nets need
        encode_corrupted(Corpus(root), root / "prepared", root / "encoders", root / "store", root / "suite", workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
        arrays = [read_arrays(root / "suite" / name / "t.safetensors")[0] for name in FEW]
        assert all(len(a["corrupted"]) == count and 0.4 < a["corrupted"].mean() < 0.6 for a in arrays)
    assert peaks[1] - peaks[0] < 8, peaks
