"What models and extraction cost: against counts by hand, that both sides do the same work, and that the records are whole."
import math
import shutil

import numpy as np
import pytest
import torch
from clips import annotate, beeps, talking, write_video
from conftest import ROOT, commit
from torch import nn

from sage_nb import efficiency, pipeline, predict
from sage_nb.backbones import ImageEncoder
from sage_nb.baselines import build_model
from sage_nb.core import DataError, read_arrays, read_json, write_arrays, write_json
from sage_nb.efficiency import (FORMS, bars, bench_text, count_parameters, extraction_text, made_up_batch, measure, measure_extraction, multiply_adds,
                                time_step, write_bench, write_extraction)
from sage_nb.encoders import AudioEncoder, VisualEncoder
from sage_nb.interaction import Estimator, Output, TemporalConv
from sage_nb.media import crop_face
from sage_nb.windows import training_batches

SMALL = dict(batch=2, frames=20, visual_dim=6, audio_dim=5)


@pytest.fixture
def tiny():
    "A model of one layer, which leaves the registry with the test."
    class Tiny(Estimator, name="tiny"):
        def __init__(self, visual_dim, audio_dim, cue_dim=0, cue_owners=""):
            super().__init__()
            self.front = nn.Linear(visual_dim, 3)
            self.head = nn.Linear(3 + audio_dim, 2)
            self.calls = []

        def forward(self, visual, audio, *rest):
            self.calls.append((self.training, torch.is_grad_enabled(), len(visual)))
            return Output(torch.tanh(self.head(torch.cat([self.front(visual), audio], -1))))

    yield Tiny
    Estimator.registry.pop("tiny")


def test_parameters_by_hand(tiny):
    assert count_parameters(tiny(7, 4)) == ((7 * 3 + 3) + (7 * 2 + 2), 7 * 2 + 2)


def test_multiply_adds_by_hand(tiny):
    model = tiny(7, 4).train()
    assert multiply_adds(model, frames=11) == 7 * 3 + 7 * 2
    assert model.training and not any(part._forward_hooks for part in model.modules())


def test_taps_of_the_depthwise_convolution_count_each_time(tiny):
    model = tiny(7, 4)
    model.conv = TemporalConv(7, kernel=3)
    plain = model.forward
    model.forward = lambda visual, *rest: plain(model.conv(model.conv(visual)), *rest)
    assert multiply_adds(model, frames=11) == 7 * 3 + 7 * 2 + 2 * 7 * 3


def test_layers_of_which_torch_knows_a_fused_kernel_count_as_their_parts(tiny):
    model = tiny(8, 4)
    model.lstm = nn.LSTM(8, 5, num_layers=2, batch_first=True)
    model.layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    plain = model.forward
    model.forward = lambda visual, *rest: plain(model.layer(visual) + model.lstm(visual)[0].sum(), *rest)
    lstm = 4 * 5 * (8 + 5) + 4 * 5 * (5 + 5)
    layer = 4 * 8 * 8 + 2 * 6 * 8 + 2 * 8 * 12  # projections; two products with the 6 frames; feed-forward
    assert multiply_adds(model, frames=6) == 8 * 3 + 7 * 2 + lstm + layer


def test_attention_costs_more_a_frame_in_longer_sequences_and_concatenation_does_not():
    cost = {name: [multiply_adds(build_model(name, 6, 5), frames) for frames in (20, 80)] for name in ("crossmodal", "concat")}
    assert cost["crossmodal"][0] < cost["crossmodal"][1] and cost["concat"][0] == cost["concat"][1]


def test_a_step_reaches_every_parameter_of_sage():
    model = build_model("sage", 6, 5)
    assert time_step(model, made_up_batch(model, 2, 20)) > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_row_for_every_registered_model_and_form():
    rows = measure(repeats={"equal": 1}, **SMALL)
    assert [row["label"] for row in rows] == sorted(Estimator.registry) + list(FORMS)
    for row in rows:
        assert list(row) == ["label", "configuration", "parameters", "fusion_parameters", "multiply_adds", "ms_step", "ms_frame", "ratio"]
        assert 0 < row["fusion_parameters"] < row["parameters"] and row["ms_step"] > 0 and row["ms_frame"] > 0 and row["multiply_adds"] > 0
    of = {row["label"]: row for row in rows}
    assert of["concat"]["ratio"] == 1 and math.isclose(of["sage"]["ratio"], of["sage"]["ms_step"] / of["concat"]["ms_step"], rel_tol=0.02)
    assert of["concat_wide"]["parameters"] == pytest.approx(of["sage"]["parameters"], rel=0.01)
    assert of["concat"]["parameters"] < of["concat_readouts"]["parameters"] < of["concat_wide"]["parameters"]


def test_both_configurations_and_their_rounds(tiny, monkeypatch):
    monkeypatch.setattr(efficiency, "build_model", lambda name, *sizes, configuration="equal", **options: built.setdefault((name, configuration), tiny(*sizes)))
    built = {}
    rows = measure(["tiny", "concat_wide"], {"equal": 4, "faithful": 2}, batch=3, frames=9)
    assert [(row["label"], row["configuration"]) for row in rows] == [("tiny", "equal"), ("concat_wide", "equal"), ("tiny", "faithful")]
    steps = [call for call in built["tiny", "faithful"].calls if call[0]]
    assert steps == [(True, True, 3)] * 3  # a warm-up and two
    frames = [call for call in built["tiny", "faithful"].calls if not call[0] and not call[1]]
    assert frames == [(False, False, 1)] * 3


def test_medians_of_interleaved_rounds(tiny, monkeypatch):
    times = {"tiny": iter([100.0, 3.0, 1.0, 50.0]), "concat": iter([100.0, 2.0, 2.0, 2.0])}  # the first warms up
    turns = []

    def clock(model, batch):
        turns.append(model.name)
        return next(times[model.name])

    monkeypatch.setattr(efficiency, "time_step", clock)
    monkeypatch.setattr(efficiency, "time_frame", lambda model, batch: 0.5)
    rows = measure(["tiny", "concat"], {"equal": 3}, **SMALL)
    assert [(row["ms_step"], row["ms_frame"], row["ratio"]) for row in rows] == [(3.0, 0.5, 1.5), (2.0, 0.5, 1.0)]
    assert all(set(turns[k : k + 2]) == {"tiny", "concat"} for k in range(0, 8, 2))


def test_bars_are_judged_and_said():
    def row(label, configuration, ms, parameters=10):
        return dict(label=label, configuration=configuration, parameters=parameters, fusion_parameters=1, multiply_adds=2000, ms_step=ms, ms_frame=0.01, ratio=1.0)

    rows = [row("sage", "equal", 15.0), row("lfan", "equal", 10.0), row("tagf", "faithful", 70.0), row("sage", "faithful", 30.0, 2_500_001)]
    assert [(bar["value"], bar["most"], bar["met"]) for bar in bars(rows)] == [(1.5, 1.5, True), (round(15 / 70, 4), 0.2, False), (2.5, 2.5, False)]
    assert [bar["most"] for bar in bars(rows[:2])] == [1.5]
    text = bench_text(dict(rows=rows, bars=bars(rows)))
    assert text.count("MISSED") == 2 and ": met" in text and "2,500,001" in text
    assert [line.split()[:2] for line in text.splitlines()[1:5]] == [["lfan", "equal"], ["sage", "equal"], ["sage", "faithful"], ["tagf", "faithful"]]


def test_the_record_is_written_whole_and_has_no_date(tmp_path, monkeypatch):
    record = write_bench(tmp_path / "results/bench.json", labels=["concat", "sage"], repeats={"equal": 1}, **SMALL)
    assert read_json(tmp_path / "results/bench.json") == record
    assert set(record) == {"processor", "torch", "threads", "repeats", "batch", "frames", "visual_dim", "audio_dim", "rows", "bars"}
    assert record["processor"] and record["threads"] == 1 and record["frames"] == 20 and record["repeats"] == {"equal": 1}
    before = (tmp_path / "results/bench.json").read_bytes()

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(efficiency, "time_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_bench(tmp_path / "results/bench.json", labels=["concat"], repeats={"equal": 1}, **SMALL)
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["bench.json"] and (tmp_path / "results/bench.json").read_bytes() == before


def test_threads_and_garbage_collection_are_as_before(monkeypatch):
    import gc

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    monkeypatch.setattr(efficiency, "time_step", lambda *_: seen.append((torch.get_num_threads(), gc.isenabled())) or 1.0)
    try:
        measure(["concat"], {"equal": 1}, **SMALL)
        assert set(seen) == {(1, False)} and torch.get_num_threads() == 2 and gc.isenabled()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("options, words", [(dict(labels=["nobody"]), "nobody is not known"), (dict(repeats={"equal": 0}), "at least one"),
                                            (dict(labels=["concat"], repeats={"huge": 1}), "configuration 'huge' is not known")])
def test_bad_input(options, words):
    with pytest.raises(DataError, match=words):
        measure(**options, **SMALL)


# --- extraction

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "A corpus of three videos of 20, 30 and 40 pictures."
    root = tmp_path_factory.mktemp("corpus")
    for frames in (40, 20, 30):
        write_video(root / "videos" / f"v{frames}.mp4", talking(frames), np.arange(frames) / 30, beeps([0.2], frames / 30))
        annotate(root / "VA_Estimation_Challenge/Train_Set" / f"v{frames}.txt", [(0.1, 0.2)] * frames)
    return root


def small_encoders(monkeypatch) -> list:
    "In the place of the lineage's; which were asked for."
    built = []

    def build(kind, name, **options):
        built.append((kind, name, options))
        return dict(visual=VisualEncoder, audio=AudioEncoder)[kind]()

    monkeypatch.setattr(efficiency, "build_encoder", build)
    return built


def test_extraction_is_measured_and_nothing_is_left(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(efficiency, "cores", lambda: 2)
    built = small_encoders(monkeypatch)
    (tmp_path / "scratch").mkdir()
    record = write_extraction(tmp_path / "results/extraction.json", corpus, scratch=tmp_path / "scratch", pictures=40, enlarged=6, seconds=0.1, trials=1,
                              lengths=(30, 60), rounds=1)
    assert read_json(tmp_path / "results/extraction.json") == record and not any((tmp_path / "scratch").iterdir())
    assert built == [("visual", "ir50", {}), ("audio", "vggish", dict(centre=0))]
    assert set(record) == {"processor", "cores", "torch", "rows", "left_out"} and record["left_out"] == []
    rows = {row["name"]: row for row in record["rows"]}
    assert len(rows) == len(record["rows"]) == 20
    for row in rows.values():
        assert list(row) == ["name", "value", "unit", "sides", "bar", "met"] and min(row["sides"]) > 0
        one, other = row["sides"]
        assert row["value"] == pytest.approx(one - other if row["unit"] == "MB" else one / other, abs=0.2, rel=0.02)
        if row["bar"]:
            word, bound = row["bar"].rsplit(" ", 1)
            assert row["met"] == (row["value"] >= float(bound) if word == "at least" else row["value"] < float(bound))
    bars = [row["bar"] for row in rows.values() if row["bar"]]
    assert bars == ["at least 0.7"] * 7 + ["at least 1.7", "at least 0.9", "at least 20", "below 100"]
    text = extraction_text(record)
    assert all(name in text for name in rows) and text.count("MISSED") == sum(row["met"] is False for row in rows.values())


def test_what_a_machine_cannot_show_is_left_out_and_said(corpus, monkeypatch):
    monkeypatch.setattr(efficiency, "cores", lambda: 1)
    monkeypatch.setattr(efficiency.sys, "platform", "other")
    small_encoders(monkeypatch)
    rows, left_out = measure_extraction(corpus, pictures=1, enlarged=4, trials=1, rounds=1)
    assert len(rows) == 18 and left_out == ["two processes against one: there is one core", "peak memory: only Linux tells it"]
    text = extraction_text(dict(rows=[dict(rows[0], met=False), dict(rows[1], met=True)], left_out=left_out))
    assert text.count("MISSED") == 1 and text.count(" met\n") == 1 and text.endswith("left out: peak memory: only Linux tells it\n")


def test_sides_take_turns_and_their_best_round_counts(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(efficiency.time, "perf_counter", lambda: clock[0])

    def side(name, seconds):
        def work(r):
            order.append((r, name))
            clock[0] += seconds[r]
            return 12
        return work

    best = efficiency._take_turns(dict(a=side("a", [6.0, 2.0, 3.0]), b=side("b", [4.0, 4.0, 1.0])), 3, "turns")
    assert best == dict(a=6.0, b=12.0) and order == [(r, name) for r in range(3) for name in "ab"]


def test_the_smallest_videos_serve(corpus, tmp_path):
    names = lambda pictures: [video.name for video in efficiency._smallest_videos(corpus, pictures)]
    assert (names(1), names(21), names(1000)) == (["v20.mp4"], ["v20.mp4", "v30.mp4"], ["v20.mp4", "v30.mp4", "v40.mp4"])
    annotate(tmp_path / "VA_Estimation_Challenge/Train_Set/v.txt", [(0.1, 0.2)])
    with pytest.raises(DataError, match="no trial of it has a video"):
        measure_extraction(tmp_path)


def test_both_sides_of_decoding_see_every_picture(corpus, tmp_path):
    videos = efficiency._smallest_videos(corpus, 50)
    assert efficiency._decode(videos, arrays=False) == efficiency._decode(videos, arrays=True) == 50
    efficiency._decoding(tmp_path, videos, 1)
    for faces, score in (("given", 1), ("found", None)):
        prepared = [read_arrays(path)[0] for path in sorted((tmp_path / faces / "0").glob("*.safetensors"))]
        assert [len(trial["crops"]) for trial in prepared] == [20, 30]
        assert all(trial["visual_ok"].all() and trial["crops"].any((1, 2, 3)).all() for trial in prepared)
        assert all(np.isnan(trial["box"]).all() == (faces == "given") for trial in prepared)


def test_cropping_with_known_boxes_decodes_every_picture_and_cuts_what_preparing_cut(corpus, tmp_path, monkeypatch):
    videos, crops = efficiency._smallest_videos(corpus, 50), []
    monkeypatch.setattr(efficiency, "crop_face", lambda image, box: crops.append(crop_face(image, box)))
    efficiency._decoding(tmp_path, videos, 1)
    prepared = np.concatenate([read_arrays(path)[0]["crops"] for path in sorted((tmp_path / "found/0").glob("*.safetensors"))])
    assert np.array_equal(crops, prepared)
    short = tmp_path / "short.safetensors"
    write_arrays(short, dict(box=np.ones((19, 4)), visual_ok=np.ones(19, bool)))
    with pytest.raises(ValueError, match="shorter"):
        efficiency._crop(videos[:1], [short])


def test_windows_are_read_with_their_copies(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(efficiency, "training_batches", lambda sequences, *rest: read.extend(sequences) or training_batches(sequences, *rest))
    efficiency._reading(tmp_path, 2, 320, 1)
    assert len(read) == 2 and all(sequence.copy.corrupted.all() and np.array_equal(sequence.copy.visual, sequence.visual) for sequence in read)


def test_two_processes_and_one_take_turns_in_every_round(corpus, tmp_path):
    efficiency._processes(tmp_path, efficiency._smallest_videos(corpus, 1), 20, 2)
    assert all((tmp_path / name / "index.json").is_file() for name in ("2-0", "1-0", "2-1", "1-1"))


def test_the_bare_networks_see_what_encoding_shows_them(corpus, tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3 * 16 * 16, 5)

        def forward(self, x):
            seen.append(x.clone())
            return self.layer(x.flatten(1))

    efficiency._decoding(tmp_path, efficiency._smallest_videos(corpus, 1), 1)
    encoders, seen = dict(visual=ImageEncoder(Network(), 5, (16, 16), (16, 16), (0.5,) * 3, (0.5,) * 3), audio=AudioEncoder()), []
    encoders["visual"].batch = 8
    efficiency._encoding(tmp_path, tmp_path / "given/0/0000.safetensors", encoders, 2)
    assert [len(pictures) for pictures in seen] == [8, 8, 4] * 5  # a first time; two rounds of each side
    assert all(torch.equal(a, b) for a, b in zip(seen, seen[6:9] * 5))
    assert not any(part._forward_pre_hooks for encoder in encoders.values() for part in encoder.modules())
    assert read_arrays(tmp_path / "features.safetensors")[0]["visual"].shape == (20, 5)


# --- the command

@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text("paths: {corpus: data/corpus, results: results}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(efficiency, "measure", lambda: [dict(label="sage", configuration=c, parameters=9, fusion_parameters=1, multiply_adds=1, ms_step=ms, ms_frame=0.1,
                                                             ratio=None) for c, ms in (("equal", 9.0), ("faithful", 9.0))]
                        + [dict(label="lfan", configuration="equal", parameters=9, fusion_parameters=1, multiply_adds=1, ms_step=1.0, ms_frame=0.1, ratio=None)])
    monkeypatch.setattr(efficiency, "measure_extraction", lambda corpus, scratch: (
        [dict(name=f"with {corpus} in {scratch.relative_to(tmp_path)}", value=0.5, unit="× frames/s", sides=[1.0, 2.0], bar="at least 0.7", met=False)], []))
    monkeypatch.setattr(predict, "measure_prediction", lambda scratch: [dict(name=f"in {scratch.relative_to(tmp_path)}", value=2.0, unit="× frames/s", sides=[60.0, 30.0],
                                                                            bar="at least 1", met=True)])
    return tmp_path


def test_bench_writes_all_records_and_a_missed_bar_is_no_failure(checkout, capsys):
    assert pipeline.main(["bench"]) == 0
    said = capsys.readouterr().out
    assert said.count("MISSED") == 2 and "written to results/bench.json" in said and "written to results/extraction.json" in said
    assert read_json(checkout / "results/bench.json")["rows"][0]["label"] == "sage"
    assert read_json(checkout / "results/extraction.json")["rows"][0]["name"] == "with None in .work"
    assert read_json(checkout / "results/prediction.json")["rows"][0]["name"] == "in .work" and "60 and 30 frames/s" in said
    assert sorted(path.name for path in (checkout / "results").iterdir()) == ["bench.json", "extraction.json", "prediction.json"]


@pytest.mark.parametrize("part, file", pipeline.RECORDS.items())
def test_bench_of_one_part_leaves_the_other_record_alone(checkout, part, file):
    (checkout / "data/corpus").mkdir(parents=True)
    (checkout / "data/sample.json").write_text("{}")  # as beside a sample
    assert pipeline.main(["bench", part]) == 0
    assert [path.relative_to(checkout).as_posix() for path in (checkout / "results").iterdir()] == [file]
    assert part != "extraction" or f"with {checkout / 'data/corpus'} in" in read_json(checkout / file)["rows"][0]["name"]


def test_bench_on_what_is_no_corpus_is_one_sentence_and_exit_code_2(checkout, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.chdir(checkout)
    (checkout / "data/corpus").mkdir(parents=True)
    (checkout / "data/sample.json").write_text("{}")  # as beside a sample
    assert pipeline.main(["bench", "extraction"]) == 2
    said = capsys.readouterr()
    assert "must hold one folder VA_Estimation_Challenge" in said.err and said.err.count("\n") == 1
    assert not (checkout / "results").exists() and not any((checkout / ".work").iterdir())


def test_verify_leaves_what_was_measured_alone(tmp_path, monkeypatch):
    for name in ("dvc.yaml", "params.yaml", "nbs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    for name in ("bench", "extraction", "prediction", "made"):
        write_json(tmp_path / "results" / f"{name}.json", 1)
    commit(tmp_path)
    monkeypatch.setattr(pipeline, "repro", lambda *_: 3)
    assert pipeline.verify(tmp_path) == 3
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["bench.json", "extraction.json", "prediction.json"]
