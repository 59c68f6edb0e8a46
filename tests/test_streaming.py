"""A stream says what the whole file would have said: from features on, and from raw video on; and it can be saved anywhere."""
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import draw_face, talking, wall, write_video

from sage_nb.affwild2 import Trial
from sage_nb.core import DataError, Sequence, read_arrays, write_arrays
from sage_nb.encoders import HEARD, AudioEncoder, VisualEncoder
from sage_nb.features import CUE_OWNERS, encode_trial
from sage_nb.media import read_trial
from sage_nb.sage import SAGE
from sage_nb.sample import write_video as make_video
from sage_nb.streaming import SageStream, Stream, file_rate, replay
from sage_nb.training import predict_sequences

torch.set_num_threads(1)
COLUMNS = ("frame time valence arousal valence_low valence_high arousal_low arousal_high reliability_visual reliability_audio "
           "face_found voice_heard face_x face_y face_width face_height").split()


def trained(**options) -> SAGE:
    "A causal SAGE whose measured numbers are not those that it begins with."
    torch.manual_seed(1)
    model = SAGE(64, 64, **dict(cue_dim=11, cue_owners=CUE_OWNERS, causal=True) | options)
    for name, buffer in model.named_buffers():
        buffer.add_(0.2 * torch.rand_like(buffer))
    return model.eval()


# --- from features on

def inputs(frames: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(2)
    values = [torch.randn(1, frames, size, generator=random) for size in (64, 64, 11)]
    flags = torch.rand(2, 1, frames // 40 + 1, generator=random).repeat_interleave(40, -1)[..., :frames] > 0.25
    flags[1, :, :200] = False  # sound begins late
    return [values[0], values[1], *flags, values[2]]


@pytest.mark.parametrize("options", [{}, dict(steps=2, gated_input=True), dict(watch_states=True, weighting="gates"), dict(fusion="decision", reliability="shared")],
                         ids=["as trained", "gated input", "states watched", "decision"])
def test_any_cut_of_the_features_gives_what_the_whole_gives(options):
    model, given, rng = trained(**options), inputs(5000 if not options else 700), np.random.default_rng(3)
    frames, stream, said, sizes = given[0].shape[1], SageStream(model), [], []
    with torch.no_grad():
        whole = model(*given[:4], None, given[4])
    at = 0
    while at < frames:
        step = int(rng.choice([1, 1, 2, 7, 64, 300]))
        said.append(stream(*(x[:, at : at + step] for x in given)))
        sizes.append(sum(x.size for x in stream.memory.values()))
        at += step
    for name in ("va", "log_var", "raw_log_var", "half_width", "reliability", "weights", "readouts", "readout_log_var", "raw_readout_log_var"):
        assert np.abs(np.concatenate([getattr(part, name) for part in said], 1) - getattr(whole, name).numpy()).max() < 1e-5, name
    assert len(set(sizes)) == 1


def test_what_a_stream_remembers_matters():
    model, given = trained(), inputs(400)
    given[2:4] = [torch.ones(1, 400, dtype=torch.bool)] * 2
    stream = SageStream(model)
    stream(*(x[:, :300] for x in given))
    for name, value in stream.memory.items():
        one, other = SageStream(model), SageStream(model)
        one.memory, other.memory = dict(stream.memory), stream.memory | {name: np.zeros_like(value)}
        rest = [x[:, 300:] for x in given]
        assert not np.array_equal(one(*rest).log_var, other(*rest).log_var) or name == "seen", name


# --- from raw video on

def voice(frames: int, rate: float, seed=0) -> np.ndarray:
    "Noise that comes and goes, coloured, at 44.1 kHz."
    rng, time = np.random.default_rng(seed), np.arange(round(44100 * frames / rate)) / 44100
    noise = np.convolve(rng.standard_normal(len(time)), np.hanning(9), "same")
    return 0.06 * noise * (np.sin(2.1 * time) > -0.4) * (1 + 0.8 * np.sin(25 * time)) + 1e-4 * rng.standard_normal(len(time))


def faces(frames: int) -> list[np.ndarray]:
    "A moving face that is gone for a while."
    gone = range(frames // 2, frames // 2 + frames // 6)
    return [wall() if n in gone else draw_face(wall(), x=80 + 6 * np.sin(n / 9), mouth=0.5 + 0.5 * np.sin(n / 3)) for n in range(frames)]


def clip(path, frames: int, rate: float, suffix=".mp4", **changes):
    return write_video(path.with_suffix(suffix), **dict(images=faces(frames), times=np.arange(frames) / rate, sound=voice(frames, rate)) | changes)


CLIPS = {
    "30 a second": dict(frames=90, rate=30),
    "24 a second, avi": dict(frames=77, rate=24, suffix=".avi"),
    "25 a second": dict(frames=61, rate=25),
    "late sound": dict(frames=75, rate=30, sound_start=0.73, sound=voice(60, 30)),
    "no sound": dict(frames=40, rate=30, sound=None),
    "sound ends early": dict(frames=80, rate=30, sound=voice(33, 30)),
    "a hole in the sound": dict(frames=90, rate=30, pauses=[(40960, 0.4)]),
    "uneven times": dict(frames=60, rate=30, times=np.cumsum(np.tile([1, 1, 3, 2], 15)) / 50),
    "three pictures": dict(frames=3, rate=30),
    "many blocks of sound": dict(frames=150, rate=2, suffix=".avi", images=talking(150)),
}


@pytest.fixture(scope="module", params=CLIPS, ids=str)
def case(request, tmp_path_factory):
    case = offline(clip(tmp_path_factory.mktemp("clip") / "clip", **CLIPS[request.param]))
    return case | dict(rows=run(case))


def offline(video, half=False) -> dict:
    "A clip, networks, and what they say of it offline."
    torch.manual_seed(0)
    encoders, model = (VisualEncoder().eval(), AudioEncoder().eval()), trained()
    raw = read_trial(Trial("clip", "test", video, None, None, "nobody", "nobody"))
    arrays = encode_trial(raw, *encoders, half)
    sequence = Sequence("clip", *(arrays[name] for name in ("visual", "audio", "va", "visual_ok", "audio_ok", "valid", "cues")))
    known = replace(sequence, **{name: np.nan_to_num(getattr(sequence, name)) for name in ("visual", "audio", "cues")})
    model.front.fit_statistics([known])
    for name in ("visual", "audio"):
        model.front.scale[name].std.clamp_(min=0.02)  # encoders that have learned nothing hardly move, and rounding should not be blown up
    [said] = predict_sequences(model, [sequence])
    columns = dict(frame=raw["frame"], time=raw["time"], face_found=raw["visual_ok"],
                   voice_heard=arrays["audio_ok"] & (np.nan_to_num(arrays["cues"][:, 6], nan=-80) > HEARD))
    for k, name in enumerate(("valence", "arousal")):
        columns |= {name: said.va[:, k], f"{name}_low": np.maximum(said.va[:, k] - said.half_width[:, k], -1),
                    f"{name}_high": np.minimum(said.va[:, k] + said.half_width[:, k], 1)}
    columns |= {f"reliability_{name}": said.reliability[:, m].mean(-1) for m, name in enumerate(("visual", "audio"))}
    columns |= {f"face_{name}": np.where(raw["visual_ok"], raw["box"][:, k], np.nan) for k, name in enumerate(("x", "y", "width", "height"))}
    return dict(video=video, model=model, encoders=encoders, rate=file_rate(video), half=half, offline=columns)


def push(stream, kind, data, moment):
    stream.push_picture(data, moment) if kind == "picture" else stream.push_sound(data, moment)


def run(case, events=None, wait=1.0, save=None, path=None, rate=None) -> list[dict]:
    "All rows of a clip; saved and restored before each event whose number is in `save`."
    stream, rows = Stream(case["model"], case["encoders"], rate or case["rate"], wait, half=case.get("half", False)), []
    for number, event in enumerate(replay(case["video"]) if events is None else events):
        if save is not None and number in save:
            stream.save(path)
            stream = Stream.restore(path, case["model"], case["encoders"])
        push(stream, *event)
        rows += stream.ready()
    return rows + stream.finish()


def differences(rows, offline) -> dict[str, float]:
    "Largest difference of each column; NaN equals NaN alone."
    assert len(rows) == len(offline["frame"]) and all(list(row) == COLUMNS for row in rows)
    out = {}
    for name in COLUMNS:
        one, other = np.array([row[name] for row in rows], float), offline[name].astype(float)
        assert np.array_equal(np.isnan(one), np.isnan(other)), name
        out[name] = np.abs(np.nan_to_num(one) - np.nan_to_num(other)).max()
    return out


def test_a_stream_says_what_the_whole_file_would_have_said(case):
    found = differences(case["rows"], case["offline"])
    assert max(found.values()) < 1e-5, found


def test_saved_and_restored_anywhere_it_goes_on_to_the_byte(case, tmp_path):
    events = list(replay(case["video"]))
    places = np.random.default_rng(len(events)).choice(len(events), min(4, len(events)), replace=False)
    assert json.dumps(case["rows"]) == json.dumps(run(case, events, save=set(places.tolist()), path=tmp_path / "state.safetensors"))


def test_how_the_sound_is_cut_changes_no_byte(case):
    assert json.dumps(case["rows"]) == json.dumps(run(case, replay(case["video"], piece=0.37)))


def test_late_sound_is_waited_for(case):
    "Sound that comes 0.6 s after the pictures changes nothing."
    events = sorted(replay(case["video"]), key=lambda event: event[2] + (0.62 if event[0] == "sound" else 0))
    assert json.dumps(case["rows"]) == json.dumps(run(case, events))


def test_features_in_half_precision_are_rounded_as_they_are_offline(tmp_path):
    case = offline(clip(tmp_path / "clip", 45, 30), half=True)
    rows = run(case, save={50}, path=tmp_path / "state.safetensors")
    assert max(differences(rows, case["offline"]).values()) < 1e-5
    assert max(differences(run(case | dict(half=False)), case["offline"]).values()) > 1e-5


@pytest.mark.parametrize("count, rate", [(1, 25.0), (20, 30.0)])
def test_the_rate_of_a_file_is_that_of_its_cues_offline(tmp_path, count, rate):
    make_video(tmp_path / "clip.mp4", [wall()] * count, np.arange(count) / 30, Fraction(30), np.zeros(16000, np.float32))
    assert file_rate(tmp_path / "clip.mp4") == pytest.approx(rate, 1e-3)


# --- one clip in particular

@pytest.fixture(scope="module")
def long(tmp_path_factory):
    torch.manual_seed(0)
    video = clip(tmp_path_factory.mktemp("clip") / "clip", 90, 30)
    return dict(video=video, model=trained(), encoders=(VisualEncoder().eval(), AudioEncoder().eval()), rate=30.0)


def test_rows_come_after_the_delay_and_no_later(long):
    stream, came = Stream(long["model"], long["encoders"], 30.0), []
    for kind, data, moment in replay(long["video"]):
        push(stream, kind, data, moment)
        now = moment + (len(data) / 16000 if kind == "sound" else 0)
        came += [(now, row) for row in stream.ready()]
        assert now - stream.delay - 0.021 <= (came[-1][1]["time"] if came else 0) + 1 / 30
    behind = [now - row["time"] for now, row in came]
    assert 0.8 < stream.delay < 0.9 and max(behind) <= stream.delay + 0.021 and max(behind) > stream.delay - 0.05
    assert 55 < len(came) < 90 and 0 < len(stream.finish()) == 90 - len(came)


def test_a_frame_does_not_wait_forever_for_sound(long):
    "From 1 s on no sound comes, though it might; frames then have none, and the delay stays bounded."
    stream, behind, rows = Stream(long["model"], long["encoders"], 30.0, wait=0.3), [], []
    for kind, data, moment in replay(long["video"]):
        if kind == "picture" or moment < 1:
            push(stream, kind, data, moment)
            new = stream.ready()
            behind += [moment - row["time"] for row in new]
            rows += new
    rows += stream.finish()
    assert max(behind) < stream.delay + 0.3 + 1 / 30 + 0.02
    assert {row["reliability_audio"] > 0 for row in rows if row["time"] < 0.95} == {True}
    assert {row["reliability_audio"] > 0 for row in rows if row["time"] > 1.05} == {False} and len(rows) == 90


def test_without_sound_nobody_waits(long):
    stream = Stream(long["model"], long["encoders"], 30.0)
    stream.end_sound()
    for kind, data, moment in replay(long["video"]):
        if kind == "picture":
            stream.push_picture(data, moment)
            [row] = stream.ready()
            assert row["time"] == moment and not row["voice_heard"] and row["reliability_audio"] == 0
    assert stream.finish() == []


def test_the_rate_matters(long):
    one, other = ([row["arousal"] for row in run(long, rate=rate)] for rate in (30.0, 40.0))
    assert np.abs(np.subtract(one, other)).max() > 1e-5


def test_memory_does_not_grow(long, tmp_path):
    events, stream, sizes = list(replay(long["video"])), Stream(long["model"], long["encoders"], 30.0), []
    for turn in range(4):
        for kind, data, moment in events:
            if moment < 2.9:
                push(stream, kind, data, moment + 2.9 * turn)
        stream.ready()
        stream.save(tmp_path / "state.safetensors")
        sizes.append((tmp_path / "state.safetensors").stat().st_size)
    assert max(sizes[1:]) < 1.1 * sizes[0]


def test_other_faces_are_remembered(long, tmp_path):
    "Two people, of whom the right one is followed: the finder knows of the other, also when it is restored."
    images = [np.concatenate([draw_face(wall(), mouth=mouth), draw_face(wall(), mouth=1 - mouth)], 1) for mouth in np.linspace(0, 1, 24)]

    def fresh():
        stream = Stream(long["model"], long["encoders"], 30.0, several_faces=True, side="right")
        stream.end_sound()
        return stream

    one, other, rows = fresh(), fresh(), ([], [])
    for number, image in enumerate(images):
        if number == 13:
            assert other._finder._others
            other.save(tmp_path / "state.safetensors")
            other = Stream.restore(tmp_path / "state.safetensors", long["model"], long["encoders"])
            assert len(other._finder._others) == len(one._finder._others)
        for stream, said in ((one, rows[0]), (other, rows[1])):
            stream.push_picture(image, number / 30)
            said += stream.ready()
    assert json.dumps(rows[0]) == json.dumps(rows[1]) and rows[0][-1]["face_x"] > 160


def test_sound_before_the_first_picture_is_kept_for_a_minute(long):
    stream, samples = Stream(long["model"], long["encoders"], 30.0), np.full(16000, 0.1, np.float32)
    for second in range(200):
        stream.push_sound(samples, float(second))
    held = sum(len(piece) for _, piece in stream._sound.pieces)
    assert 60 * 16000 <= held <= 61 * 16000
    for n in range(30):
        stream.push_picture(wall(), 199 + n / 60)
    [row, *_] = stream.finish()
    assert row["voice_heard"]


def test_options_are_kept_as_plain_values(long, tmp_path):
    stream = Stream(long["model"], long["encoders"], np.float32(30), np.int64(1), np.int64(48), np.bool_(True), detect_every=np.int64(3), smallest_face=np.float32(0.5),
                    several_faces=np.bool_(False))
    stream.save(tmp_path / "state.safetensors")
    again = Stream.restore(tmp_path / "state.safetensors", long["model"], long["encoders"])
    assert again.options == stream.options == dict(rate=30.0, wait=1.0, crop_size=48, half=True, detect_every=3, smallest_face=0.5, several_faces=False)
    with pytest.raises(DataError, match="no such face model"):
        Stream(long["model"], long["encoders"], 30.0, face_model=tmp_path / "none.onnx")


def test_a_face_model_given_as_a_path_is_saved_as_text(long, tmp_path, monkeypatch):
    import sage_nb.streaming as streaming

    find = streaming.face_finder
    monkeypatch.setattr(streaming, "face_finder", lambda face_model=None, **search: find(**search))
    Stream(long["model"], long["encoders"], 30.0, face_model=Path("a.onnx")).save(tmp_path / "state.safetensors")
    assert Stream.restore(tmp_path / "state.safetensors", long["model"], long["encoders"]).options["face_model"] == "a.onnx"


@pytest.mark.parametrize("wrong", [dict(rate="30"), dict(rate=float("nan")), dict(rate=True), dict(wait=None), dict(crop_size=0), dict(crop_size=48.5), dict(half=1),
                                   dict(detect_every=0), dict(detect_every=2.5), dict(side="top"), dict(colour="red"), dict(face_model=3)], ids=str)
def test_options_that_do_not_fit_are_refused(long, wrong):
    with pytest.raises(DataError, match="|".join(wrong)):
        Stream(long["model"], long["encoders"], **dict(rate=30.0) | wrong)


@pytest.mark.parametrize("moment", ["1", None, True, float("nan"), 1j, [1.0]], ids=str)
def test_a_moment_is_a_number(long, moment):
    stream = Stream(long["model"], long["encoders"], 30.0)
    for push_it, data in ((stream.push_picture, wall()), (stream.push_sound, np.zeros(5, np.float32))):
        with pytest.raises(DataError, match="moment"):
            push_it(data, moment)
    assert stream.finish() == []


@pytest.fixture(scope="module")
def saved(long, tmp_path_factory):
    "The arrays and the rest of a stream in the middle, with rows that nobody took."
    stream, path = Stream(long["model"], long["encoders"], 30.0, several_faces=True), tmp_path_factory.mktemp("state") / "state.safetensors"
    for event in replay(long["video"]):
        if event[2] < 1.4:
            push(stream, *event)
    stream.save(path)
    assert list(Stream.restore(path, long["model"], long["encoders"]).ready()[0]) == COLUMNS
    return read_arrays(path)


def places(value, at=()):
    "Where something is in a JSON value: keys to be followed, but one element of each list."
    parts = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, part in parts:
        yield (*at, key)
        yield from places(part, (*at, key))


def changed(value, at, change):
    "A copy in which the holder of a place, and its last key, were given to `change`."
    holder = value = json.loads(json.dumps(value))
    for key in at[:-1]:
        holder = holder[key]
    change(holder, at[-1])
    return value


def refused(path, arrays, meta, long):
    write_arrays(path, arrays, meta)
    with pytest.raises(DataError, match=r"state\.safetensors") as caught:
        Stream.restore(path, long["model"], long["encoders"])
    assert "\n" not in str(caught.value)


def test_no_field_may_be_missing_or_of_another_kind(long, saved, tmp_path):
    arrays, meta = saved

    def remove(holder, key):
        del holder[key]

    def spoil(holder, key):
        holder[key] = {"another": "kind"}

    path = tmp_path / "state.safetensors"
    for at in places(meta):
        refused(path, arrays, changed(meta, at, spoil), long)
        if not (isinstance(at[-1], int) and at[-2] in ("_rows", "pieces")) and at[:2] != ("options", "several_faces"):  # a list may be shorter, an option be left out
            refused(path, arrays, changed(meta, at, remove), long)


def test_no_array_may_be_missing_added_or_of_another_type(long, saved, tmp_path):
    (arrays, meta), path = saved, tmp_path / "state.safetensors"
    for name, value in {(value.dtype, value.shape): (name, value) for name, value in arrays.items()}.values():  # one of each kind
        refused(path, {key: array for key, array in arrays.items() if key != name}, meta, long)
        refused(path, arrays | {name: value.astype(np.int64)}, meta, long)
        refused(path, arrays | {name: value[None]}, meta, long)
    refused(path, arrays | dict(more=np.zeros(3)), meta, long)


@pytest.mark.parametrize("at", [(), ("_sound",), ("_finder",), ("_finder", "_person"), ("_sage",), ("_sage", "memory"), ("_coarse",), ("_narrow",), ("_frames", 0), ("_rows", 0)], ids=str)
def test_nothing_is_added(long, saved, tmp_path, at):
    for name in ("finish", "margin", "detector", "__class__", "push"):
        refused(tmp_path / "state.safetensors", saved[0], changed(saved[1], ("stream", *at, name), lambda holder, key: holder.update({key: 1})), long)


@pytest.mark.parametrize("name, value", [("_said", 10**6), ("_said", -1), ("_said", 0), ("_listened", 0), ("_pictures", 10**400), ("_gone", 1), ("_newest", 0.0), ("_began", 99.0), ("_frames", [])])
def test_what_contradicts_itself_is_refused(long, saved, tmp_path, name, value):
    refused(tmp_path / "state.safetensors", saved[0], changed(saved[1], ("stream", name), lambda holder, key: holder.update({key: value})), long)


@pytest.mark.parametrize("options", [dict(gated_messages=False), dict(reliability="none")], ids=str)
def test_another_model_with_the_same_weights_is_refused(long, tmp_path, options):
    path, other = tmp_path / "state.safetensors", trained(**options)
    other.load_state_dict(long["model"].state_dict())
    Stream(long["model"], long["encoders"], 30.0).save(path)
    with pytest.raises(DataError, match="another model"):
        Stream.restore(path, other, long["encoders"])
    audio = AudioEncoder().eval()
    audio.load_state_dict(long["encoders"][1].state_dict())
    Stream.restore(path, long["model"], (long["encoders"][0], audio))
    audio.margin = 0.6
    with pytest.raises(DataError, match="other encoders"):
        Stream.restore(path, long["model"], (long["encoders"][0], audio))


@pytest.mark.parametrize("damage", ["cut", "stranger", "network"])
def test_a_state_that_does_not_belong_is_refused(long, tmp_path, damage):
    path = tmp_path / "state.safetensors"
    Stream(long["model"], long["encoders"], 30.0).save(path)
    model = long["model"]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "stranger":
        write_arrays(path, *read_arrays(path)[:1])
    else:
        model = trained(steps=0)
    with pytest.raises(DataError, match=r"state\.safetensors"):
        Stream.restore(path, model, long["encoders"])
