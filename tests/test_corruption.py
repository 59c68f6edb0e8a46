"""The families of the robustness suite: each changes what it says, by how much it says, and nothing else."""
import cv2
import numpy as np
import pytest
from clips import draw_face, wall

from sage_nb.core import DataError, Sequence
from sage_nb.corruption import FAMILIES, conditions, corrupt_picture, corrupt_sequence, corrupt_sound, plan_stretches, seeded, stretch_of

RATE, FPS, OWNERS = 16000, 25, "vvaab"
BOX = (38.0, 36.0, 84.0, 84.0)
INSIDE = np.s_[36:120, 38:122]
FACE = draw_face(wall((150, 120, 90, 180)))
PICTURES = [name for name, about in FAMILIES.items() if (about.level, about.modality) == ("media", "visual")]
SOUNDS = [name for name, about in FAMILIES.items() if (about.level, about.modality) == ("media", "audio")]
FEATURES = [name for name, about in FAMILIES.items() if about.level == "features"]


def decibels(x):
    return 10 * np.log10(np.mean(np.square(x, dtype=float)))


@pytest.fixture(scope="module")
def voice():
    "Three seconds of a voice-like sound, at the level of a soft speaker."
    time = np.arange(3 * RATE) / RATE
    return (0.06 * sum(np.sin(2 * np.pi * 140 * k * time) / k for k in range(1, 9)) * (1 + np.sin(2 * np.pi * 3 * time))).astype(np.float32)


@pytest.fixture(scope="module")
def others():
    rng = np.random.default_rng(5)
    return [(gain * rng.standard_normal(length)).astype(np.float32) for gain, length in ((0.3, 20000), (0.01, 90000))]


@pytest.fixture
def sequence():
    rng, T = np.random.default_rng(0), 210
    flags = rng.random((3, T)) > 0.1
    visual, audio, va, cues = (rng.normal(size=(T, d)).astype(np.float32) for d in (4, 3, 2, 5))
    return Sequence("clip", visual, audio, va, *flags, cues, "person")


def middle(count=3 * RATE):
    return np.arange(count) // RATE == 1


# --- the table

def test_the_table_says_what_the_conditions_are():
    assert len(PICTURES) == len(SOUNDS) == 3 and len(FEATURES) == 4
    first, *rest = conditions()
    assert first[:1] == ("clean",) and first.severity == 0
    assert [(c.family, c.severity) for c in rest] == [(name, s) for name in FAMILIES for s in (1, 2, 3)]
    assert all(c[1:3] == FAMILIES[c.family][:2] and c.seen == FAMILIES[c.family].seen for c in rest)


# --- stretches

@pytest.mark.parametrize("seconds, fps", [(3.2, 30), (4.0, 25), (8.4, 24), (10, 30), (13.7, 29.97), (17, 30), (300, 25)])
def test_stretches_cover_half_in_two_to_four_seconds(seconds, fps):
    times = 0.3 + np.arange(round(seconds * fps)) / fps
    for seed in range(30):
        planned = plan_stretches(times, seeded(seed, "blur", "clip"))
        lengths, gaps = np.diff(planned, axis=1)[:, 0], np.diff(np.r_[times[0], planned.ravel(), times[-1] + 1 / fps])[::2]
        if seconds >= 4:
            assert lengths.min() > 2 - 1e-6 and lengths.max() < 4 + 1e-6
        assert lengths.sum() == pytest.approx(len(times) / fps / 2) and gaps.min() > 0.1
        inside = stretch_of(times, planned)
        assert abs((inside >= 0).mean() - 0.5) < 2 * len(planned) / len(times)
        assert inside.max() == len(planned) - 1 and (np.diff(inside[inside >= 0]) >= 0).all()


def test_stretches_are_of_seed_family_and_trial_alone():
    times = np.arange(400) / 30
    names = ((0, "blur", "a"), (0, "blur", "a"), (1, "blur", "a"), (0, "noise", "a"), (0, "blur", "b"))
    plans = [plan_stretches(times, seeded(*name)) for name in names]
    assert np.array_equal(plans[0], plans[1])
    assert not any(np.array_equal(plans[0], other) for other in plans[2:])


def test_a_clip_of_one_frame_has_no_stretch_to_speak_of():
    assert (stretch_of(np.array([0.5]), plan_stretches(np.array([0.5]), seeded(0))) == -1).all()


# --- pictures

@pytest.mark.parametrize("family", PICTURES)
def test_a_picture_is_changed_the_same_for_the_same_seed_and_its_source_is_not(family):
    before = FACE.copy()
    for severity in (1, 2, 3):
        out = corrupt_picture(FACE, BOX, family, severity, seeded(0, family))
        assert out.shape == FACE.shape and out.dtype == np.uint8 and not np.array_equal(out, FACE)
        assert np.array_equal(out, corrupt_picture(FACE, BOX, family, severity, seeded(0, family)))
    assert np.array_equal(FACE, before) and np.array_equal(corrupt_picture(FACE, BOX, family, 0, seeded(0)), FACE)


@pytest.mark.parametrize("seed", range(12))
def test_an_object_covers_its_share_of_the_face_box(seed):
    same = []
    for severity, share in enumerate(FAMILIES["occlusion"].strengths, 1):
        out = corrupt_picture(FACE, BOX, "occlusion", severity, seeded(seed))
        other = corrupt_picture(255 - FACE, BOX, "occlusion", severity, seeded(seed))
        hidden = (out == other).all(-1)  # the object is what does not depend on the picture behind it
        assert hidden[INSIDE].mean() == pytest.approx(share, abs=0.02)
        assert np.array_equal(out[~hidden], FACE[~hidden])
        same.append(hidden)
    assert not (same[0] & ~same[1]).any() and not (same[1] & ~same[2]).any()  # from the same side


def test_objects_come_from_all_sides():
    sides = set()
    for seed in range(30):
        hidden = (corrupt_picture(FACE, BOX, "occlusion", 1, seeded(seed)) == corrupt_picture(255 - FACE, BOX, "occlusion", 1, seeded(seed))).all(-1)
        rows, columns = np.nonzero(hidden[INSIDE])
        sides.add((round(rows.mean() / 84, 1), round(columns.mean() / 84, 1)))
    assert len(sides) == 4


@pytest.mark.parametrize("box", [(-20.0, -10.0, 84.0, 84.0), (120.0, 120.0, 84.0, 84.0), (200.0, 0.0, 50.0, 50.0), (0.0, 0.0, 160.0, 160.0)])
def test_an_object_may_reach_out_of_the_picture(box):
    for seed in range(8):
        assert corrupt_picture(FACE, box, "occlusion", 3, seeded(seed)).shape == FACE.shape


def test_blur_takes_detail_by_severity_and_is_gaussian():
    detail = [cv2.Laplacian(corrupt_picture(FACE, BOX, "blur", s, seeded(0))[INSIDE], cv2.CV_32F).var() for s in range(4)]
    assert all(worse < 0.9 * better for better, worse in zip(detail, detail[1:]))  # at last only rounding to 8 bits is left
    for severity, share in enumerate(FAMILIES["blur"].strengths, 1):
        exact = cv2.GaussianBlur(FACE, (0, 0), share * 84)
        difference = np.abs(corrupt_picture(FACE, BOX, "blur", severity, seeded(0))[INSIDE].astype(int) - exact[INSIDE])
        assert difference.mean() < 2


def test_darkness_is_a_gain_after_a_gamma():
    for severity, gain in enumerate(FAMILIES["darkness"].strengths, 1):
        out = corrupt_picture(FACE, BOX, "darkness", severity, seeded(0))
        assert out == pytest.approx(255 * gain * (FACE / 255) ** 1.5, abs=0.51)


# --- sound

@pytest.mark.parametrize("family", SOUNDS)
def test_a_sound_is_changed_in_its_stretch_alone(voice, others, family):
    before, active = voice.copy(), middle()
    for severity in (1, 2, 3):
        out = corrupt_sound(voice, RATE, active, family, severity, seeded(0), others)
        assert out.dtype == np.float32 and out.shape == voice.shape and np.abs(out).max() <= 1
        assert np.array_equal(out, corrupt_sound(voice, RATE, active, family, severity, seeded(0), others))
        changed = np.flatnonzero(out != voice)
        assert RATE - 161 <= changed.min() < RATE + 800 and 2 * RATE - 800 < changed.max() <= 2 * RATE + 161
    assert np.array_equal(voice, before) and corrupt_sound(voice, RATE, active, family, 0, seeded(0)) is voice
    empty = np.zeros(0, np.float32)
    assert not len(corrupt_sound(empty, RATE, np.zeros(0, bool), family, 3, seeded(0), others))


@pytest.mark.parametrize("family", ["noise", "babble"])
@pytest.mark.parametrize("gain", [1.0, 0.05])
def test_the_ratio_is_to_the_level_of_the_clip(voice, others, family, gain):
    voice, active = gain * voice, np.ones(len(voice), bool)
    for severity, ratio in enumerate(FAMILIES[family].strengths, 1):
        added = corrupt_sound(voice, RATE, active, family, severity, seeded(0), others).astype(float) - voice
        assert decibels(voice) - decibels(added) == pytest.approx(ratio, abs=0.5)


def test_noise_and_babble_grow_without_becoming_others(voice, others):
    for family in ("noise", "babble"):
        added = [(corrupt_sound(0.1 * voice, RATE, middle(), family, s, seeded(0), others) - 0.1 * voice)[middle()] for s in (1, 3)]
        assert np.corrcoef(added)[0, 1] > 0.99


def test_every_voice_of_babble_is_as_loud(voice, others):
    each = [corrupt_sound(voice, RATE, middle(), "babble", 2, seeded(0), [other]) - voice for other in others]
    assert decibels(each[0][middle()]) == pytest.approx(decibels(each[1][middle()]), abs=0.5)
    both = corrupt_sound(voice, RATE, middle(), "babble", 2, seeded(0), [*others, np.zeros(100, np.float32)]) - voice  # silence is no voice
    assert decibels(both[middle()]) == pytest.approx(decibels(each[0][middle()]), abs=1)


@pytest.mark.parametrize("gain", [1.0, 0.05])
def test_clipping_is_relative_to_the_level(voice, gain):
    voice, active = gain * voice, np.ones(len(voice), bool)
    limit, shares = 3 * np.sqrt(np.mean(voice.astype(float) ** 2)), []
    for severity in (1, 2, 3):
        out = corrupt_sound(voice, RATE, active, "clipping", severity, seeded(0))
        assert np.abs(out).max() == pytest.approx(min(limit, 1), rel=1e-4)
        shares.append((np.abs(out) > 0.999 * limit).mean())
        free = middle() & (np.abs(out) < 0.99 * limit)  # away from the fades
        assert out[free] == pytest.approx(voice[free] * 10 ** (FAMILIES["clipping"].strengths[severity - 1] / 20), rel=0.02, abs=1e-6)
    assert 0.1 < shares[0] < shares[1] - 0.1 < shares[2] - 0.2


def test_babble_without_anybody_is_refused(voice):
    for nobody in ([], [np.zeros(100, np.float32)]):
        with pytest.raises(DataError, match="babble needs the sound of other people"):
            corrupt_sound(voice, RATE, middle(), "babble", 1, seeded(0), nobody)


# --- features

def unchanged(a: Sequence, b: Sequence, but: set[str]) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name), equal_nan=name == "cues") for name in
               {"visual", "audio", "va", "visual_ok", "audio_ok", "valid", "cues"} - but) and (a.id, a.group) == (b.id, b.group)


@pytest.mark.parametrize("family", FEATURES)
def test_a_sequence_is_changed_the_same_for_the_same_seed_and_its_source_is_not(sequence, family):
    before = {name: np.copy(value) for name, value in vars(sequence).items()}
    drawn = set()
    for seed in range(6):
        (one, lost), (two, same) = (corrupt_sequence(sequence, family, 2, seed, FPS, OWNERS) for _ in range(2))
        assert unchanged(one, two, set()) and np.array_equal(lost, same)
        drawn.add((lost.tobytes(), one.audio.tobytes()))
    assert len(drawn) > 1
    assert all(np.array_equal(value, getattr(sequence, name)) for name, value in before.items())
    clean, lost = corrupt_sequence(sequence, family, 0, 0, FPS, OWNERS)
    assert clean is sequence and not lost.any()


@pytest.mark.parametrize("family, modality", [("visual_missing", "visual"), ("audio_missing", "audio"), ("frame_drops", "visual")])
def test_what_is_missing_is_not_ok_and_not_there(sequence, family, modality):
    T, before = len(sequence), np.zeros(len(sequence), bool)
    for severity, share in enumerate(FAMILIES[family].strengths, 1):
        worse, lost = corrupt_sequence(sequence, family, severity, 3, FPS, OWNERS)
        assert lost.sum() == round(share * T) and not (before & ~lost).any()
        assert np.array_equal(getattr(worse, f"{modality}_ok"), getattr(sequence, f"{modality}_ok") & ~lost)
        assert unchanged(worse, sequence, {modality, f"{modality}_ok", "cues"})
        assert not getattr(worse, modality)[lost].any() and np.array_equal(getattr(worse, modality)[~lost], getattr(sequence, modality)[~lost])
        owned = np.array([owner in (modality[0], "b") for owner in OWNERS])
        assert np.isnan(worse.cues[lost][:, owned]).all()
        assert np.array_equal(worse.cues[:, ~owned], sequence.cues[:, ~owned]) and np.array_equal(worse.cues[~lost], sequence.cues[~lost])
        if family == "frame_drops" and severity < 3:
            runs = np.diff(np.flatnonzero(np.diff(np.r_[False, lost, False].astype(int))))[::2]
            assert len(runs) > 10 and runs.min() == 1 and runs.max() > 2
        elif family != "frame_drops":
            assert (np.diff(np.flatnonzero(lost)) == 1).all()  # one piece
        before = lost


@pytest.mark.parametrize("fps", [25, 30, 29.97])
@pytest.mark.parametrize("severity", [1, 2, 3])
def test_shifted_sound_moves_by_seconds_and_alone(sequence, severity, fps):
    directions, n = set(), round(FAMILIES["sound_shift"].strengths[severity - 1] * fps)
    for seed in range(8):
        worse, changed = corrupt_sequence(sequence, "sound_shift", severity, seed, fps, OWNERS)
        late = np.array_equal(worse.audio[n:], sequence.audio[:-n])
        kept, source, gone = (np.s_[n:], np.s_[:-n], np.s_[:n]) if late else (np.s_[:-n], np.s_[n:], np.s_[-n:])
        assert np.array_equal(worse.audio[kept], sequence.audio[source]) and np.array_equal(worse.audio_ok[kept], sequence.audio_ok[source])
        assert np.array_equal(worse.cues[kept][:, 2:4], sequence.cues[source][:, 2:4])
        assert not worse.audio_ok[gone].any() and not worse.audio[gone].any() and np.isnan(worse.cues[gone][:, 2:]).all()
        assert np.array_equal(worse.cues[:, :2], sequence.cues[:, :2]) and np.array_equal(worse.cues[kept][:, 4], sequence.cues[kept][:, 4])
        assert unchanged(worse, sequence, {"audio", "audio_ok", "cues"}) and changed.all()
        directions.add(late)
    assert directions == {True, False}


def test_a_sound_shifted_beyond_the_clip_is_gone(sequence):
    worse, _ = corrupt_sequence(sequence, "sound_shift", 3, 0, 1000, OWNERS)
    assert not worse.audio_ok.any() and not worse.audio.any()


@pytest.mark.parametrize("family", FEATURES)
def test_sequences_need_no_cues(sequence, family):
    sequence.cues = None
    assert corrupt_sequence(sequence, family, 3, 0, FPS)[0].cues is None


@pytest.mark.parametrize("family, severity", [("rain", 1), ("blur", 4), ("blur", -1), ("noise", 1), ("visual_missing", 1)])
def test_a_picture_meets_only_its_own_families(family, severity):
    with pytest.raises(DataError, match="take"):
        corrupt_picture(FACE, BOX, family, severity, seeded(0))


def test_sounds_and_sequences_meet_only_their_own_families(voice, sequence):
    for family in ("blur", "sound_shift", "rain"):
        with pytest.raises(DataError, match="take"):
            corrupt_sound(voice, RATE, middle(), family, 1, seeded(0))
    for family in ("blur", "noise", "rain"):
        with pytest.raises(DataError, match="take"):
            corrupt_sequence(sequence, family, 1)
