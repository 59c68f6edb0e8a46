"What models cost: against counts by hand, and that the record is whole."
import math

import pytest
import torch
from torch import nn

from sage_nb import efficiency
from sage_nb.baselines import build_model
from sage_nb.core import DataError, read_json
from sage_nb.efficiency import FORMS, bars, bench_text, count_parameters, made_up_batch, measure, multiply_adds, time_step, write_bench
from sage_nb.interaction import Estimator, Output, TemporalConv

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
