"The sample corpus's conditions: the probes' three views of a trial, and the whole measurement on a tiny made-up store."
import numpy as np
import pandas as pd
import pytest
import torch

from sage_nb import conditions
from sage_nb.conditions import PROBES, gated, measure_conditions, side_file_only, telling, voice_and_arousal
from sage_nb.core import Sequence, read_json, write_arrays, write_json
from sage_nb.sample import AUDIO_NUISANCES, PHASES, VISUAL_NUISANCES
from sage_nb.tables import write_conditions

FRAMES = 60
PHASE = np.repeat(["speak", "listen", "react"], 20)
SIGHT = np.where(np.arange(FRAMES) % 20 < 5, "hand", "")
SOUND = np.where(np.arange(FRAMES) % 20 >= 15, "noise", "")
TRUTH = pd.DataFrame(dict(phase=PHASE, visual_nuisance=SIGHT, audio_nuisance=SOUND))


def draw(name, seed):
    rng = np.random.default_rng(seed)
    va = np.tanh(np.cumsum(rng.normal(size=(FRAMES, 2)), 0) / 5).astype(np.float32)
    ok = np.ones((2, FRAMES), bool)
    ok[:, :2] = False
    return Sequence(name, np.repeat(va, 2, 1), va + 1, va, ok[0], ok[1], np.arange(FRAMES) > 3, rng.normal(size=(FRAMES, 2)).astype(np.float32), name)


@pytest.fixture
def corpus(tmp_path):
    "Feature store, prepared corpus and side files; the sound is a tone that follows arousal in pitch and level."
    names = {split: [f"{split}{i}" for i in range(n)] for split, n in (("train", 8), ("dev", 3), ("calibration", 3))}
    index = {name: dict(split=split, group=name, subject=name) for split, part in names.items() for name in part}
    time = np.arange(FRAMES) / 25
    (tmp_path / "truth").mkdir()
    for seed, name in enumerate(index):
        s = draw(name, seed)
        arrays = dict(visual=s.visual, audio=s.audio, va=s.va, visual_ok=s.visual_ok, audio_ok=s.audio_ok, valid=s.valid, cues=s.cues,
                      frame=np.arange(1, FRAMES + 1, dtype=np.int32), time=time)
        write_arrays(tmp_path / "store" / f"{name}.safetensors", arrays, index[name])
        lines = [",".join(("frame", *TRUTH)), *(f"{i},{','.join(row)}" for i, row in enumerate(TRUTH.to_numpy()[:-1], 1))]  # a row less than frames
        (tmp_path / "truth" / f"{name}.csv").write_text("\n".join(lines) + "\n")
        if name in names["dev"]:
            arousal = np.interp(np.arange(16000 * FRAMES // 25) / 16000, time, s.va[:, 1])
            sound = (0.2 * 10 ** (arousal / 2) * np.sin(2 * np.pi * np.cumsum(160 * 2 ** (arousal / 2)) / 16000)).astype(np.float32)
            write_arrays(tmp_path / "prepared" / f"{name}.safetensors", dict(va=s.va, valid=s.valid, time=time, sound=sound),
                         dict(has_sound=True, sound_start=0.0))
    write_json(tmp_path / "store" / "index.json", index)
    return tmp_path


def measure(corpus, **settings):
    return measure_conditions(corpus / "store", corpus / "prepared", corpus / "truth", corpus / "out", [0], workers=1, **(dict(epochs=2, window=40) | settings))


def test_gated_trusts_what_tells_the_truth():
    view = gated(draw("a", 0), TRUTH)
    for t in range(FRAMES):
        assert view.visual_ok[t] == (t >= 2 and SIGHT[t] == "")
        assert view.audio_ok[t] == (t >= 2 and SOUND[t] == "" and PHASE[t] == "speak")


def test_the_side_file_alone_says_phase_and_nuisance_and_nothing_else():
    view = side_file_only(draw("a", 0), TRUTH)
    assert view.visual_ok.all() and view.audio_ok.all()
    for values, names, column in ((view.visual, VISUAL_NUISANCES, SIGHT), (view.audio, AUDIO_NUISANCES, SOUND)):
        assert values.shape == (FRAMES, len(PHASES) + len(names)) and set(np.unique(values)) == {0, 1}
        for t in range(FRAMES):
            assert values[t].sum() == 1 + (column[t] != "") and values[t, PHASES.index(PHASE[t])] == 1
            assert column[t] == "" or values[t, len(PHASES) + names.index(column[t])] == 1


def test_where_a_modality_should_tell_and_where_it_should_not():
    (sight_good, sight_bad), (sound_good, sound_bad) = telling("visual", TRUTH), telling("audio", TRUTH)
    assert np.array_equal(sight_good, (SIGHT == "") & (PHASE != "speak")) and np.array_equal(sight_bad, SIGHT == "hand")
    assert np.array_equal(sound_good, (SOUND == "") & (PHASE == "speak")) and np.array_equal(sound_bad, (SOUND == "") & (PHASE == "listen"))


def test_every_condition_is_measured(corpus):
    torch.set_num_threads(1)
    table = measure_conditions(corpus / "store", corpus / "prepared", corpus / "truth", corpus / "out", [0], workers=1, epochs=2, window=40)
    assert np.isfinite(table.value).all() and list(table.columns) == ["condition", "value", "least", "most", "met"]
    assert (table.met == ((table.least <= table.value) & (table.value <= table.most))).all()
    value = table.set_index("condition").value
    assert value["face found where no visual nuisance is (share of frames)"] == 1  # the two frames without a face lie under a nuisance
    voice = voice_and_arousal((corpus / "prepared/dev0.safetensors", TRUTH))  # one of three clips
    assert voice.corr().loc["arousal"].min() > 0.5 and voice.mean().abs().max() < 1e-6 and len(voice) < len(TRUTH)
    assert value[[name for name in value.index if name.startswith(("pitch", "level"))]].min() > 0.5
    results = {path.stem: read_json(path) for path in (corpus / "out").iterdir()}
    assert set(results) == {f"{probe.replace(' ', '_')}-0" for probe in PROBES}
    assert value["gain by the true masks (P)"] == pytest.approx(results["gated-0"]["p"] - results["concat-0"]["p"])
    audio = next(name for name in value.index if name.startswith("audio alone, no audio nuisance"))
    assert value[audio] == pytest.approx(results["audio-0"]["p_telling"] - results["audio-0"]["p_misled"])
    assert all("p_telling" not in results[f"{name}-0"] for name in ("concat", "gated", "side_file"))


def test_a_probe_that_is_done_is_kept_and_another_is_not(corpus, monkeypatch):
    torch.set_num_threads(1)
    first = measure(corpus)
    trained, fit = [], conditions.fit
    monkeypatch.setattr(conditions, "fit", lambda *args, **settings: (trained.append(settings), fit(*args, **settings)))
    (corpus / "out" / "gated-0.json").unlink()
    pd.testing.assert_frame_equal(measure(corpus), first)
    assert len(trained) == 1
    measure(corpus, epochs=1)
    assert len(trained) == 1 + len(PROBES)


def test_a_corpus_without_side_files_gets_an_empty_table_that_says_why(corpus):
    for path in (corpus / "truth").iterdir():
        path.unlink()
    table = measure(corpus)
    assert table.empty and list(table) == ["condition", "value", "least", "most", "met"] and not (corpus / "out").exists()
    write_json(corpus / "conditions.json", dict(seeds=[0], conditions=table.to_dict("split", index=False)))
    write_conditions(corpus / "conditions.json", corpus / "tables", "wild")
    for kind in ("md", "tex"):
        assert "this corpus has no side files of phases and nuisances" in (corpus / "tables" / f"conditions.{kind}").read_text()
