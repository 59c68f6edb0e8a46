"Every baseline: its definition against numbers worked out in numpy, and the promises that all of them keep, in both configurations."
import json
import math

import numpy as np
import pytest
import torch

from sage_nb.baselines import (CONFIGURATIONS, Attention, JointAttention, LastStateGate, LineageTCN, MaskedBatchNorm, RecurrentGate,
                               TransformerLayer, build_model, ordinal_kl, positions)
from sage_nb.core import DataError
from sage_nb.interaction import Estimator
from sage_nb.losses import va_loss
from sage_nb.training import fit, load_run, predict_sequences
from sage_nb.windows import collate, made_up_sequences

VISUAL, AUDIO, CUES = 7, 5, 2
SMALL = dict(visual_width=16, audio_width=8)
NAMES = sorted(Estimator.registry)
LINEAGE = ["jca", "rjca", "grjca", "tagf"]  # joint cross-attention
WHOLE_WINDOW = [*LINEAGE, "crossmodal", "raav"]
EVERY = pytest.mark.parametrize("name,configuration", [(name, configuration) for name in NAMES for configuration in CONFIGURATIONS])
FAITHFUL = pytest.mark.parametrize("name", NAMES)  # what test_models.py asks of every name in the equal configuration


def tensors(output):
    return {name: value for name, value in output._asdict().items() if torch.is_tensor(value)}


def model_of(name, configuration="equal", **options):
    "A narrow model; the fixed map over time has windows of 50 frames."
    torch.manual_seed(0)
    short = dict(frames=50, dim=32) if name in LINEAGE and configuration == "faithful" else {}
    return build_model(name, VISUAL, AUDIO, CUES, configuration, cue_owners="va", **SMALL | short | options).eval()


def inputs(frames=40, windows=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    visual_ok, audio_ok = (torch.rand(windows, frames, generator=g) > 0.2 for _ in range(2))
    return dict(visual=torch.randn(windows, frames, VISUAL, generator=g), audio=torch.randn(windows, frames, AUDIO, generator=g),
                visual_ok=visual_ok, audio_ok=audio_ok, mask=torch.ones(windows, frames, dtype=torch.bool),
                cues=torch.randn(windows, frames, CUES, generator=g))


def longer(given, padding):
    "The same sequences with `padding` frames behind them that are none, full of what must not be seen."
    out = {}
    for key, value in given.items():
        windows = len(value)
        filler = torch.zeros(windows, padding, dtype=torch.bool) if key == "mask" else (
            torch.ones(windows, padding, dtype=torch.bool) if value.dtype == torch.bool else torch.full((windows, padding, value.shape[2]), 1e4))
        out[key] = torch.cat([value, filler], 1)
    return out


def states_of(model, frames=12, windows=2, seed=0):
    "Random states, flags and mask, as `fuse` is given them; all four cases of flags occur."
    g = torch.Generator().manual_seed(seed)
    states = [torch.randn(windows, frames, width, generator=g) for width in model.front.widths]
    ok = torch.rand(windows, frames, 2, generator=g) > 0.3
    ok[0, :4] = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    return states, ok, torch.ones(windows, frames, dtype=torch.bool)


def fused(model, states, ok, mask):
    with torch.no_grad():
        return model.fuse(states, torch.zeros(*mask.shape, 0), ok, mask)


def linear(layer, x):
    weight = layer.weight.detach().double().numpy()
    return x @ weight.T + (0 if layer.bias is None else layer.bias.detach().double().numpy())


def layer_norm(layer, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + layer.eps)
    return x * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def head(model_head, z):
    "The shared head, without dropout."
    return np.tanh(linear(model_head.out, gelu(linear(model_head.hidden, z))))


def numpy_of(*tensors):
    return [t.double().numpy() if t.is_floating_point() else t.numpy() for t in tensors]


def close(tensor, array, atol=1e-5):
    np.testing.assert_allclose(tensor.detach().numpy(), array, atol=atol, rtol=1e-4)


# --- promises of every model, in both configurations

def test_every_name_is_there():
    assert set(NAMES) == set("sage visual audio concat late poe gmu lfan can jca rjca grjca tagf crossmodal cold raav".split())
    assert set(CONFIGURATIONS["faithful"]) == set(NAMES)


def test_the_recipe_is_json_and_builds_the_model_again():
    for name in NAMES:
        for configuration in CONFIGURATIONS:
            model = model_of(name, configuration)
            recipe = json.loads(json.dumps(model.recipe))
            again = build_model(**recipe, configuration=configuration)
            assert again.recipe == model.recipe and again.configuration == configuration
            assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@EVERY
def test_every_parameter_gets_a_gradient(name, configuration):
    "Through the loss of training, from default initial values; several batches, for a ReLU may be shut in one of them."
    sequences, _ = made_up_sequences(8, 0, (60, 80), VISUAL, AUDIO)
    model = model_of(name, configuration).double().train()
    model.fit_statistics(sequences)
    if name == "sage":  # the last layer of the messages and of the branch begin at rest
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else parameter.data.add_(0.01)
    for start in (0, 20):
        batch = collate(sequences, [(i, start) for i in range(8)], 40)
        batch = batch._replace(visual=batch.visual.double(), audio=batch.audio.double(), cues=batch.cues.double())
        flags = batch.visual_ok.clone()
        flags[:3, 10:30] = False
        output = model(*batch._replace(visual_ok=flags).inputs)
        loss = va_loss(output.va, batch.va, batch.valid[..., None]) + sum(model.extra_loss(output, batch.va, batch.valid).values())
        loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    largest = max(p.grad.abs().max() for p in model.parameters())
    assert not [n for n, p in model.named_parameters() if p.grad.abs().max() < 1e-7 * largest]  # a rounding error is no gradient


@FAITHFUL
def test_padding_changes_nothing(name):
    model, given = model_of(name, "faithful"), inputs()
    short, long = tensors(model(**given)), tensors(model(**longer(given, 37)))
    for key in short:
        torch.testing.assert_close(long[key][:, :40], short[key], atol=2e-5, rtol=1e-4)


@EVERY
def test_training_does_not_see_padding_either(name, configuration):
    "Statistics of a batch, where there are any, are of real frames; the loss and the gradients too."
    sequences, _ = made_up_sequences(4, 0, (60, 60), VISUAL, AUDIO)
    batch = collate(sequences, [(i, 0) for i in range(4)], 40)
    gradients = []
    for padding in (0, 21):
        model = model_of(name, configuration, dropout=0.0).train()
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        given = dict(zip(("visual", "audio", "visual_ok", "audio_ok", "mask", "cues"), batch.inputs))
        output = model(**longer(given, padding) if padding else given)
        va = torch.cat([batch.va, torch.full((4, padding, 2), float("nan"))], 1)
        valid = torch.cat([batch.valid, torch.zeros(4, padding, dtype=torch.bool)], 1)
        (va_loss(output.va, va, valid[..., None]) + sum(model.extra_loss(output, va, valid).values())).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for n, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][n], gradient, atol=2e-3 * scale + 1e-6, rtol=1e-2, msg=lambda m: f"{n}: {m}")


@FAITHFUL
def test_features_of_a_missing_modality_change_nothing(name):
    model, given = model_of(name, "faithful"), inputs()
    before = tensors(model(**given))
    for value in (1e30, float("nan"), float("inf")):
        changed = {m: torch.where(given[f"{m}_ok"][..., None], given[m], value) for m in ("visual", "audio")}
        changed["cues"] = torch.where(torch.stack([given["visual_ok"], given["audio_ok"]], -1), given["cues"], value)
        for key, after in tensors(model(**given | changed)).items():
            assert torch.equal(after, before[key])


@EVERY
def test_nothing_is_undefined_when_nobody_is_there(name, configuration):
    model, given = model_of(name, configuration), inputs(windows=4)
    nobody = torch.zeros(40, dtype=torch.bool)
    given["visual_ok"][0], given["audio_ok"][1] = nobody, nobody
    given["visual_ok"][2], given["audio_ok"][2] = nobody, nobody
    for value in tensors(model(**given)).values():
        assert torch.isfinite(value.float()).all()
    model.train()
    sum(x.float().sum() for x in tensors(model(**given)).values() if x.requires_grad).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@FAITHFUL
def test_sequences_of_a_batch_do_not_see_each_other(name):
    model, given = model_of(name, "faithful"), inputs()
    alone = tensors(model(**{key: value[1:2] for key, value in given.items()}))
    for key, together in tensors(model(**given)).items():
        torch.testing.assert_close(together[1:2], alone[key], atol=2e-5, rtol=1e-4)


@FAITHFUL
@pytest.mark.parametrize("frames", [1, 121])
def test_any_length(name, frames):
    output = model_of(name, "faithful")(**inputs(frames, 1))
    assert output.va.shape == (1, frames, 2) and output.va.abs().max() <= 1
    assert all(torch.isfinite(value.float()).all() for value in tensors(output).values())


@EVERY
def test_a_model_uses_the_modalities_it_names(name, configuration):
    model, given = model_of(name, configuration), inputs()
    before, uses = model(**given).va, dict(visual=name != "audio", audio=name != "visual")
    for cue, key in enumerate(("visual", "audio")):
        moved = given["cues"].clone()
        moved[..., cue] += 1
        for changed in ({key: given[key] + 1}, dict(cues=moved), {f"{key}_ok": ~given[f"{key}_ok"]}):
            assert torch.equal(model(**given | changed).va, before) is not uses[key]


@pytest.mark.parametrize("sizes", [(64, 64), (512, 128)])
@pytest.mark.parametrize("name", NAMES)
def test_equal_models_are_of_a_size(name, sizes):
    model = build_model(name, *sizes, 6)
    front = sum(p.numel() for p in model.front.parameters())
    assert sum(p.numel() for p in model.parameters()) - front <= 600_000
    if name not in ("visual", "audio"):
        assert front == sum(p.numel() for p in build_model("concat", *sizes, 6).front.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_faithful_models_train_at_their_own_size(name):
    torch.manual_seed(0)
    model = build_model(name, 512, 128, configuration="faithful").train()
    widths = tuple(w for w, m in ((256, "visual"), (128, "audio")) if m in model.front.modalities)
    assert model.front.widths == widths
    size = sum(p.numel() for p in model.parameters())
    assert size <= 2_500_000 if name == "sage" else size > 600_000
    output, va = model(torch.randn(2, 6, 512), torch.randn(2, 6, 128)), torch.rand(2, 6, 2) - 0.5
    valid = torch.ones(2, 6, dtype=torch.bool)
    (va_loss(output.va, va, valid[..., None]) + sum(model.extra_loss(output, va, valid).values())).backward()
    before = [p.detach().clone() for p in model.head.parameters()] if hasattr(model, "head") else []
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not before or any(not torch.equal(p, b) for p, b in zip(model.head.parameters(), before))


@pytest.mark.parametrize("name,configuration", [("tagf", "faithful"), ("can", "faithful"), ("cold", "equal"), ("raav", "equal")])
def test_a_run_is_written_and_read_again(name, configuration, tmp_path):
    sequences, _ = made_up_sequences(6, 0, (50, 60), VISUAL, AUDIO)
    model = model_of(name, configuration)
    fit(model, sequences[:3], sequences[3:], sequences[3:], tmp_path, epochs=1, window=40, batch=2)
    again = load_run(tmp_path)
    for a, b in zip(predict_sequences(model, sequences), predict_sequences(again, sequences)):
        np.testing.assert_array_equal(a.va, b.va)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("sage", "visual", "audio")])
def test_each_learns_where_one_modality_is_not_enough(name):
    "One target stands in the features of sight, the other in those of sound."
    g = torch.Generator().manual_seed(1)
    va = torch.tanh(torch.randn(4, 20, 2, generator=g).cumsum(1) * 0.2)
    maps = [torch.randn(1, size, generator=g) for size in (VISUAL, AUDIO)]
    visual, audio = (va[..., m, None] * maps[m] + 0.1 * torch.randn(4, 20, maps[m].shape[1], generator=g) for m in range(2))
    model, valid = model_of(name).train(), torch.ones(4, 20, dtype=torch.bool)
    optimiser = torch.optim.AdamW(model.parameters(), 0.005)
    for _ in range(30):
        output = model(visual, audio, cues=torch.zeros(4, 20, 2))
        loss = va_loss(output.va, va, valid[..., None])
        optimiser.zero_grad()
        (loss + sum(model.extra_loss(output, va, valid).values())).backward()
        optimiser.step()
    assert loss < 0.35, f"1 - CCC {loss:.2f}: it hears or sees only one of them"


@pytest.mark.parametrize("name", WHOLE_WINDOW)
def test_a_model_without_a_causal_form_says_so(name):
    with pytest.raises(DataError, match=f"{name}.*no causal form"):
        model_of(name, causal=True)


def test_an_unknown_map_over_time_is_named():
    with pytest.raises(DataError, match="time_map: 'learned' is not known"):
        model_of("rjca", time_map="learned")


# --- concat and its controls

def test_faithful_concat_is_linear():
    model = model_of("concat", "faithful")
    states, ok, mask = states_of(model)
    x = np.concatenate(numpy_of(*states), -1)
    close(fused(model, states, ok, mask).va, np.tanh(linear(model.head, x)))


def test_hidden_widens_the_head_alone():
    narrow, wide = model_of("concat"), model_of("concat", hidden=300)
    assert wide.head.hidden.weight.shape == (300, 24)
    assert [p.shape for p in wide.front.parameters()] == [p.shape for p in narrow.front.parameters()]


@pytest.mark.parametrize("name,columns", [("concat", [0, 1]), ("visual", [0]), ("audio", [1])])
def test_readouts_are_trained_as_sages_are(name, columns):
    sequences, _ = made_up_sequences(4, 0, (50, 60), VISUAL, AUDIO)
    model = model_of(name, readouts=True)
    model.fit_statistics(sequences)
    labels = np.concatenate([s.va[s.valid] for s in sequences]).astype(np.float64)
    close(model.label_variance, labels.var(0))
    given, va, valid = inputs(), torch.rand(3, 40, 2) - 0.5, torch.rand(3, 40) > 0.3
    output = model(**given)
    ok = np.stack([given["visual_ok"], given["audio_ok"]], -1)[..., columns]
    errors = [(output.unimodal.detach().numpy()[b, t, m] - va.numpy()[b, t]) ** 2 / labels.var(0)
              for b in range(3) for t in range(40) for m in range(len(columns)) if valid[b, t] and ok[b, t, m]]
    assert model.extra_loss(output, va, valid)["readout"].item() == pytest.approx(0.5 * np.mean(errors), rel=1e-4)
    both_ok = torch.stack([given["visual_ok"], given["audio_ok"]], -1)
    states, _ = model.front(given["visual"], given["audio"], both_ok, given["mask"], given["cues"])
    for m, x in enumerate(states):
        close(output.unimodal[..., m, :], np.tanh(linear(model.readouts.maps[0][m], x.detach().double().numpy())))


def test_without_readouts_there_is_no_term_and_no_parameter():
    model = model_of("concat")
    assert model.extra_loss(model(**inputs()), torch.zeros(3, 40, 2), torch.ones(3, 40, dtype=torch.bool)) == {}
    assert not any("readouts" in n or "label" in n for n in model.state_dict())


# --- late, poe, cold

def say(model, visual, audio):
    "Make the heads of the two modalities say the same in every frame."
    for head_, value in zip(model.heads, (visual, audio)):
        torch.nn.init.zeros_(head_.out.weight)
        head_.out.bias.data = torch.atanh(torch.tensor(value))


def test_late_is_the_mean_of_those_who_are_there():
    model = model_of("late")
    say(model, (0.6, 0.1), (-0.2, 0.5))
    states, ok, mask = states_of(model)
    va = fused(model, states, ok, mask).va[0, :4]
    close(va, [[0.2, 0.3], [0.6, 0.1], [-0.2, 0.5], [0.2, 0.3]])


@pytest.mark.parametrize("name", ["poe", "cold"])
def test_experts_weigh_by_inverse_variance(name):
    model = model_of(name)
    say(model, (0.6, 0.6), (-0.2, -0.2))
    model.label_variance.fill_(1.0)
    for spread, value in zip(model.log_var, (-3.0, -3.0 + math.log(3))):  # the sound's variance is three times as large
        torch.nn.init.zeros_(spread[-1].weight)
        spread[-1].bias.data.fill_(value)
    states, ok, mask = states_of(model)
    output = fused(model, states, ok, mask)
    variance = output.expert_log_var.exp()
    assert torch.allclose(variance[..., 1, :] / variance[..., 0, :], torch.tensor(3.0), rtol=0.1)
    v = variance[0, 0, :, 0].double().numpy()
    both = (0.6 / v[0] - 0.2 / v[1]) / (1 / v[0] + 1 / v[1])
    assert both == pytest.approx(0.4, abs=0.02)
    close(output.va[0, :4], [[both, both], [0.6, 0.6], [-0.2, -0.2], [0.2, 0.2]])


def expert_case():
    model = model_of("cold")
    model.label_variance.copy_(torch.tensor([0.05, 0.2]))
    states, ok, mask = states_of(model)
    va, valid = torch.rand(2, 12, 2) - 0.5, torch.rand(2, 12) > 0.2
    output = fused(model, states, ok, mask)
    return model, output, va, valid, numpy_of(output.expert_va, output.expert_log_var, va, valid[..., None] & ok)


def test_poe_is_trained_by_beta_likelihood():
    model, output, va, valid, (mean, log_var, y, counts) = expert_case()
    terms = model_of("poe").extra_loss(output, va, valid)
    e, v = (mean - y[:, :, None])[counts], np.exp(log_var)[counts]
    assert list(terms) == ["likelihood"]
    assert terms["likelihood"].item() == pytest.approx((0.5 * (e**2 / v + np.log(v)) * np.sqrt(v)).mean(), rel=1e-4)


def test_colds_terms():
    model, output, va, valid, (mean, log_var, y, counts) = expert_case()
    e = (mean - y[:, :, None]) ** 2 / [0.05, 0.2]
    v = np.exp(log_var) / [0.05, 0.2]
    terms = model.extra_loss(output, va, valid)

    def kl(a, b):
        p, q = softmax(a), softmax(b)
        return (p * np.log(p / q)).sum(-1)

    within = np.mean([kl(e[:, :, m, k][counts[..., m]], v[:, :, m, k][counts[..., m]]) for m in range(2) for k in range(2)])
    both = counts.all(-1)
    across = np.mean([kl(e[both][:, :, k], v[both][:, :, k]) for k in range(2)])
    assert terms["within"].item() == pytest.approx(0.1 * within, rel=1e-4)
    assert terms["across"].item() == pytest.approx(0.1 * across, rel=1e-4)
    assert terms["expert"].item() == pytest.approx(0.1 * e[counts].mean(), rel=1e-4)


def test_the_order_of_errors_teaches_the_variances_alone():
    error, variance = torch.rand(30, requires_grad=True), torch.rand(30, requires_grad=True)
    ordinal_kl(error, variance, torch.tensor(True), 0).backward()
    assert error.grad is None and variance.grad.abs().sum() > 0
    assert np.corrcoef(-variance.grad, error.detach())[0, 1] > 0.3  # where the error is large, the variance is told to grow


@pytest.mark.parametrize("name", ["poe", "cold"])
def test_unlabelled_frames_train_no_expert(name):
    model, given = model_of(name), inputs()
    va, valid = torch.rand(3, 40, 2) - 0.5, torch.rand(3, 40) > 0.4
    output = model(**given)
    before = model.extra_loss(output, va, valid)
    after = model.extra_loss(output, torch.where(valid[..., None], va, float("nan")), valid)
    assert all(torch.equal(before[k], after[k]) for k in before)
    gradients = torch.autograd.grad(sum(after.values()), [p for p in model.parameters()], allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in gradients)


# --- gates over features, attention between tokens

def test_gmu():
    model = model_of("gmu", dim=6)
    states, ok, mask = states_of(model)
    v, a = numpy_of(*states)
    z = sigmoid(linear(model.gate, np.concatenate([v, a], -1)))
    seen, heard = ok[..., :1].numpy(), ok[..., 1:].numpy()
    z = np.where(seen & ~heard, 1, np.where(heard & ~seen, 0, z))
    f = z * np.tanh(linear(model.value[0], v)) + (1 - z) * np.tanh(linear(model.value[1], a))
    close(fused(model, states, ok, mask).va, head(model.head, f))


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_can(configuration):
    model = model_of("can", configuration, dim=6)
    states, ok, mask = states_of(model)
    z = np.concatenate([linear(p, x) for p, x in zip(model.project, numpy_of(*states))], -1)
    there = np.repeat(ok.numpy(), 6, -1)
    w = softmax(np.where(there, linear(model.attend, z), -1e4))
    some = ok.any(-1).numpy()
    assert (w[some][~there[some]] == 0).all()
    if configuration == "equal":
        expected = head(model.head, 12 * w * z)
    else:
        norm = model.head.norm
        norm.running_mean.copy_(torch.linspace(-0.1, 0.1, 256))
        norm.running_var.fill_(0.3)
        h = (linear(model.head.hidden, w * z) - np.linspace(-0.1, 0.1, 256)) / np.sqrt(0.3 + norm.eps)
        expected = np.tanh(linear(model.head.out, np.where(h > 0, h, 0.01 * h)))
    close(fused(model, states, ok, mask).va, expected)


def test_the_scale_of_can_is_repaired():
    "256 weights of sum 1 would leave the head with almost nothing to see."
    model = model_of("can", visual_width=128, audio_width=64)
    states, ok, mask = states_of(model)
    seen = []
    model.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    fused(model, states, torch.ones_like(ok), mask)
    z = torch.cat([p(x) for p, x in zip(model.project, states)], -1)
    assert 0.5 < (seen[0].std() / z.std()).item() < 2


def test_lfan():
    model = model_of("lfan", dim=8)
    states, ok, mask = states_of(model)
    tokens = [linear(t, x) for t, x in zip(model.token, numpy_of(*states))]
    q, k, v = (np.stack([t[..., 8 * i : 8 * i + 8] for t in tokens], 2) for i in range(3))  # [B, T, M, 8]
    expected = np.zeros((2, 12, 2))
    for b in range(2):
        for t in range(12):
            heard = np.zeros((2, 8))
            for part in (slice(0, 4), slice(4, 8)):  # two heads
                logits = q[b, t][:, part] @ k[b, t][:, part].T / 2
                logits = np.where(ok[b, t].numpy(), logits, -1e4)
                heard[:, part] = softmax(logits) @ v[b, t][:, part]
            f = layer_norm(model.norm, v[b, t] + linear(model.mix, heard))
            expected[b, t] = head(model.head, np.concatenate([states[0][b, t].double().numpy(), *f]))
    close(fused(model, states, ok, mask).va, expected)


# --- joint cross-attention

def joint_step(step, states, ok):
    "One step for one sequence, as the equations stand."
    x, ok = [s * o[:, None] for s, o in zip(states, ok.T)], ok.T
    joint = linear(step.joint, np.concatenate(x, -1))
    after = []
    for m in range(2):
        if step.frames:
            key = linear(step.time[m], x[m].T).T
            size = math.sqrt(joint.shape[1])
        else:
            weight, bias = step.time[m].weight.detach().double().numpy(), step.time[m].bias.detach().double().numpy()
            padded = np.pad(x[m], ((2, 2), (0, 0)))
            key = np.stack([bias + sum(weight[i] * padded[t + i] for i in range(5)) for t in range(len(x[m]))])
            size = max(ok[m].sum(), 1)
        c = np.tanh(sum(np.outer(key[t], joint[t]) for t in range(len(key)) if ok[m][t]) / size)
        y = np.maximum(np.tanh(linear(step.value[m], states[m]) @ c), 0)
        after.append(states[m] + np.maximum(linear(step.out[m], y), 0))
    return after


@pytest.mark.parametrize("frames", [None, 12])
def test_a_step_of_joint_cross_attention(frames):
    torch.manual_seed(0)
    step = JointAttention((6, 4), 5, frames).eval()
    states, ok = [torch.randn(1, 12, 6), torch.randn(1, 12, 4)], torch.rand(1, 12, 2) > 0.3
    for mine, theirs in zip(step(states, ok), joint_step(step, [x[0].double().numpy() for x in states], ok[0].numpy())):
        close(mine[0], theirs)


def test_a_step_drops_as_the_lineage_does():
    torch.manual_seed(0)
    step, states = JointAttention((64, 32), 40, None).train(), [torch.randn(4, 90, 64), torch.randn(4, 90, 32)]
    ok = torch.ones(4, 90, 2, dtype=torch.bool)
    assert step.dropout == 0.6
    kept = (step(states, ok)[0] != states[0]).float().mean().item()
    step.eval()
    assert kept == pytest.approx(0.4 * (step(states, ok)[0] != states[0]).float().mean().item(), abs=0.06)


@pytest.mark.parametrize("name", LINEAGE)
def test_what_leaves_the_interaction(name):
    "Last state, or states weighed by the gate, then the head."
    model = model_of(name, dim=5)
    [network] = model.networks
    states, ok, mask = states_of(model, windows=1)
    stages = [[x[0].double().numpy() for x in states]]
    for step in network.interaction:
        stages.append(joint_step(step, stages[-1], ok[0].numpy()))
    assert len(stages) == (2 if name == "jca" else 3)
    out = []
    for m in range(2):
        kept = np.stack([stage[m] for stage in stages], 1)  # [T, S, C]
        if name == "grjca":
            g = softmax(linear(network.gates[m].score, kept[:, -1]) / 0.1)
            out.append(np.maximum((g[..., None] * kept).sum(1), 0))
        elif name == "tagf":
            g = recurrent_gate(network.gates[m], kept)
            out.append((g[..., None] * kept).sum(1))
        else:
            out.append(kept[:, -1])
    close(fused(model, states, ok, mask).va[0], head(network.head, np.concatenate(out, -1)))


def recurrent_gate(gate, kept):
    "TAGF's gate for states [T, S, C], by an LSTM cell written out."
    runs = []
    for suffix, order in (("", range(kept.shape[1])), ("_reverse", reversed(range(kept.shape[1])))):
        w, r, b, c = (getattr(gate.lstm, f"{part}_l0{suffix}").detach().double().numpy()
                      for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h = cell = np.zeros((len(kept), r.shape[1]))
        run = {}
        for s in order:
            i, f, g, o = np.split(kept[:, s] @ w.T + b + h @ r.T + c, 4, -1)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(cell)
            run[s] = h
        runs.append(np.stack([run[s] for s in range(kept.shape[1])], 1))
    u = linear(gate.project, np.concatenate([kept, *runs], -1))
    u = u / np.linalg.norm(u, axis=-1, keepdims=True)
    return softmax(u.mean(-1) / 0.1)


@pytest.mark.parametrize("name", LINEAGE)
def test_the_fixed_map_works_window_by_window(name):
    model = model_of(name, time_map="fixed", frames=20)
    states, ok, mask = states_of(model, frames=47)
    whole = fused(model, states, ok, mask).va
    for start in (0, 20, 40):
        part = slice(start, start + 20)
        alone = fused(model, [x[:, part] for x in states], ok[:, part], mask[:, part]).va
        torch.testing.assert_close(whole[:, part], alone, atol=1e-5, rtol=1e-4)
    moved = [x.clone() for x in states]
    for x in moved:
        x[:, 20:] += 1
    torch.testing.assert_close(fused(model, moved, ok, mask).va[:, :20], whole[:, :20], atol=1e-6, rtol=1e-6)  # no window sees another


@pytest.mark.parametrize("name", LINEAGE)
def test_the_free_map_sees_the_whole_sequence(name):
    model = model_of(name)
    states, ok, mask = states_of(model, frames=600)
    moved = [x.clone() for x in states]
    for x in moved:
        x[:, 500:] += 3
    assert not torch.allclose(fused(model, moved, ok, mask).va[:, :400], fused(model, states, ok, mask).va[:, :400], atol=1e-4)


@pytest.mark.parametrize("time_map", ["free", "fixed"])
def test_frames_without_a_modality_are_not_correlated(time_map):
    torch.manual_seed(0)
    step = JointAttention((6, 4), 5, 30 if time_map == "fixed" else None).eval()
    states, ok = [torch.randn(1, 30, 6), torch.randn(1, 30, 4)], torch.rand(1, 30, 2) > 0.3
    before = step.correlation(states, ok)
    changed = [torch.where(o[..., None], x, 1e3) for x, o in zip(states, ok.unbind(-1))]
    for a, b in zip(before, step.correlation(changed, ok)):
        assert torch.equal(a, b) and a.abs().max() < 1
    silent = ok.clone()
    silent[..., 1] = False
    assert (step.correlation(states, silent)[1] == 0).all()


@pytest.mark.parametrize("time_map", ["free", "fixed"])
def test_the_interaction_is_alive(time_map):
    "Of sizes at which a tanh still has a slope and a ReLU still opens, in the configurations that use them."
    torch.manual_seed(0)
    step = JointAttention((128, 64), 96, None) if time_map == "free" else JointAttention((256, 128), 384, 300)
    widths = (128, 64) if time_map == "free" else (256, 128)
    states, ok = [torch.randn(2, 300, w) + torch.randn(2, 1, w) for w in widths], torch.ones(2, 300, 2, dtype=torch.bool)
    for c in step.eval().correlation(states, ok):
        assert 0.01 < c.abs().mean() < 0.7
    for x, y in zip(states, step(states, ok)):
        assert 0.2 < (y != x).float().mean() < 0.8


# --- the two facts about TAGF's gate, in the faithful form

@pytest.mark.parametrize("modality,width,low,high", [(0, 256, 0.17, 0.55), (1, 128, 0.13, 0.64)])
def test_tagfs_weights_are_bounded(modality, width, low, high):
    "A unit vector of D entries has a mean within 1 / sqrt(D); D = 2 C, both directions of the LSTM."
    torch.manual_seed(0)
    gate = build_model("tagf", 512, 128, configuration="faithful").networks[0].gates[modality]
    bound = 1 / math.sqrt(gate.project.out_features) / 0.1
    assert gate.project.out_features == 2 * width
    least, most = (math.exp(b) / (math.exp(b) + 2 * math.exp(-b)) for b in (-bound, bound))
    assert (round(least, 2), round(most, 2)) == (low, high)
    for scale in (1.0, 100.0):
        weights = gate(scale * torch.randn(4, 50, 3, width))
        assert weights.min() >= least and weights.max() <= most
    torch.nn.init.zeros_(gate.project.weight)  # the bounds are reached, and not passed, by a projection that wants nothing else
    gate.project.weight.data[:, 0] = 1e6
    states = torch.randn(1, 2, 3, width)
    states[0, 0, :, 0], states[0, 1, :, 0] = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, 1, 1])
    extreme = gate(states)[0, :, 0]
    close(extreme, [most, least], atol=1e-5)


def test_tagfs_gate_is_blind_to_time():
    torch.manual_seed(0)
    for gate in build_model("tagf", 512, 128, configuration="faithful").networks[0].gates.eval():
        states = torch.randn(2, 90, 3, gate.lstm.input_size)
        order = torch.randperm(90)
        weights = gate(states)
        torch.testing.assert_close(gate(states[:, order]), weights[:, order], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(gate(states[:, :, [1, 0, 2]]), weights[:, :, [1, 0, 2]], atol=1e-5)  # it does see the order of the states


def test_grjcas_gate_asks_the_last_state():
    gate, states = LastStateGate(6, 3), torch.randn(2, 9, 3, 6)
    changed = states.clone()
    changed[:, :, :2] += 1
    assert torch.equal(gate(states), gate(changed))
    close(gate(states), softmax(linear(gate.score, states[:, :, 2].double().numpy()) / 0.1))


def test_faithful_networks_do_not_share():
    "Valence and arousal have networks of their own, front end included."
    model = model_of("grjca", "faithful").train()
    va = model(**inputs()).va
    valence, arousal = (torch.autograd.grad(va[..., k].sum(), list(model.parameters()), retain_graph=True, allow_unused=True) for k in range(2))
    used = [[g is not None and bool(g.any()) for g in gradients] for gradients in (valence, arousal)]
    assert all(a is not b for a, b in zip(*used))


@pytest.mark.parametrize("name,millions", [("grjca", 8.9), ("tagf", 10.7)])
def test_a_faithful_network_has_what_the_public_code_uses(name, millions):
    "14 and 15.8 million, less 5.1 million that never get a gradient; the flags' own part is not theirs."
    model = build_model(name, 512, 128, configuration="faithful")
    own = sum(p.numel() for part in (*(tcn[0] for tcn in model.front.tcn.values()), model.networks[0]) for p in part.parameters())
    flags = sum(p.numel() for tcn, dim in zip(model.front.tcn.values(), (512, 128)) for p in tcn[0].skips[0].parameters()) + 2 * 5 * (512 + 128)
    assert round((own - flags) / 1e6, 1) == millions


# --- attention over time

def attention(layer, x, memory, keep):
    "For one sequence, query by query and head by head."
    q, k, v = linear(layer.query, x), linear(layer.key, memory), linear(layer.value, memory)
    size, seen = q.shape[1] // layer.heads, np.flatnonzero(keep)
    y = np.zeros_like(q)
    for h in range(layer.heads):
        part = slice(h * size, (h + 1) * size)
        for t in range(len(q)):
            if len(seen):
                y[t, part] = softmax(k[seen][:, part] @ q[t, part] / math.sqrt(size)) @ v[seen][:, part]
    return linear(layer.out, y) * bool(len(seen))


def transformer(layer, x, keep):
    y = layer_norm(layer.norms[0], x)
    x = x + attention(layer.attention, y, y, keep)
    return x + linear(layer.back, gelu(linear(layer.forth, layer_norm(layer.norms[1], x))))


def sines(frames, dim):
    angle = np.arange(frames)[:, None] / 10000 ** (np.arange(0, dim, 2) / dim)
    return np.concatenate([np.sin(angle), np.cos(angle)], -1) / math.sqrt(dim)


def test_positions():
    close(positions(40, 6, torch.zeros(1)), sines(40, 6))


@pytest.mark.parametrize("keep", [[True] * 9, [True, False] * 4 + [True], [False] * 9])
def test_attention(keep):
    torch.manual_seed(0)
    layer, x, memory = Attention(8, 2), torch.randn(1, 5, 8), torch.randn(1, 9, 8)
    close(layer(x, memory, torch.tensor([keep]))[0], attention(layer, *(y[0].double().numpy() for y in (x, memory)), keep))


def test_a_transformer_layer():
    torch.manual_seed(0)
    layer, x, keep = TransformerLayer(8, 2).eval(), torch.randn(1, 9, 8), torch.rand(1, 9) > 0.3
    close(layer(x, keep)[0], transformer(layer, x[0].double().numpy(), keep[0].numpy()))


def test_crossmodal():
    model = model_of("crossmodal", dim=8)
    states, ok, mask = states_of(model, windows=1)
    keep = [*ok[0].numpy().T, mask[0].numpy()]
    v, a = (x[0].double().numpy() for x in states)
    streams = [linear(p, x) + sines(12, 8) for p, x in zip(model.project, (v, a, np.concatenate([v, a], -1)))]
    streams = [layer_norm(n, transformer(e, x, k)) for n, e, x, k in zip(model.norms, model.encoders, streams, keep)]
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    asked = [streams[p] + attention(cross, streams[p], streams[q], keep[q]) for cross, (p, q) in zip(model.cross, pairs)]
    close(fused(model, states, ok, mask).va[0], head(model.head, np.concatenate(asked, -1)))


def test_raav():
    model = model_of("raav", dim=8)
    model.prior.data = torch.tensor([0.5, -0.7])
    states, ok, mask = states_of(model, windows=1)
    x = [s[0].double().numpy() for s in states]
    there = ok[0].numpy()
    logits = np.concatenate([linear(mlp[2], gelu(linear(mlp[0], s))) for mlp, s in zip(model.logit, x)], -1)
    logits = np.where(there, logits + np.log(softmax(np.array([0.5, -0.7]))), -1e4)
    w = softmax(logits) * there
    w = w / np.maximum(w.sum(-1, keepdims=True), 1e-6)
    close(model.weights(states, ok)[0], w)
    assert w[3].tolist() == [0, 0] and w[1].tolist() == [1, 0] and w[2].tolist() == [0, 1]
    visual, audio = (linear(p, s) for p, s in zip(model.project, x))
    u = w[:, :1] * visual + w[:, 1:] * audio
    latents = model.latents.detach().double().numpy()
    latents = latents + attention(model.compress, latents, layer_norm(model.norms[0], audio + sines(12, 8)), there[:, 1])
    assert latents.shape == (4, 8)
    u = u + sines(12, 8)
    u = u + attention(model.recall, layer_norm(model.norms[1], u), latents, np.ones(4, bool))
    for layer in model.layers:
        u = transformer(layer, u, mask[0].numpy())
    close(fused(model, states, ok, mask).va[0], head(model.head, layer_norm(model.final, u)))


def test_a_silent_sequence_recalls_no_sound():
    model = model_of("raav")
    states, ok, mask = states_of(model)
    ok = torch.stack([mask, torch.zeros_like(mask)], -1)
    before = fused(model, states, ok, mask).va
    assert torch.equal(fused(model, [states[0], states[1] + 5], ok, mask).va, before)


# --- the lineage's front end

def test_the_lineages_tcn():
    torch.manual_seed(0)
    tcn = LineageTCN(3, (4, 4), dropout=0.0).eval()
    tcn.norm.running_mean.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    tcn.norm.running_var.fill_(0.5)
    x = torch.randn(1, 12, 3)

    def conv(layer, x):
        g, v = (p.detach().double().numpy()
                for p in (layer.parametrizations.weight.original0, layer.parametrizations.weight.original1))
        w = g * v / np.sqrt((v**2).sum((1, 2), keepdims=True))  # [out, in, taps]
        d = layer.dilation[0]
        past = np.concatenate([np.zeros((4 * d, x.shape[1])), x])
        return np.stack([layer.bias.detach().double().numpy() + sum(w[:, :, i] @ past[t + i * d] for i in range(5)) for t in range(len(x))])

    def leaky(x):
        return np.where(x > 0, x, 0.01 * x)

    h = x[0].double().numpy()
    for block, skip, dilation in zip(tcn.blocks, tcn.skips, (1, 2)):
        assert [c.dilation for c in block] == [(dilation,)] * 2
        y = leaky(conv(block[1], leaky(conv(block[0], h))))
        if isinstance(skip, torch.nn.Conv1d):
            h = h @ skip.weight.detach().double().numpy()[:, :, 0].T + skip.bias.detach().double().numpy()
        h = leaky(y + h)
    assert [isinstance(s, torch.nn.Identity) for s in tcn.skips] == [False, True]
    close(tcn(x, torch.ones(1, 12, dtype=torch.bool))[0], (h - [0.1, 0.2, 0.3, 0.4]) / np.sqrt(0.5 + 1e-5))


def test_faithful_front_ends_do_not_see_the_future():
    model, given = model_of("concat", "faithful"), inputs()
    later = given | {key: torch.cat([given[key][:, :25], given[key][:, 25:] + 1], 1) for key in ("visual", "audio", "cues")}
    before, after = model(**given).va, model(**later).va
    assert torch.equal(before[:, :25], after[:, :25]) and not torch.allclose(before[:, 25:], after[:, 25:])


def test_statistics_are_of_real_frames():
    norm, x, mask = MaskedBatchNorm(3), 5 + 2 * torch.randn(2, 40, 3), torch.arange(40) < torch.tensor([40, 25])[:, None]
    y = norm(torch.where(mask[..., None], x, 1e6), mask)
    rows = x[mask].double().numpy()
    close(y[mask], (rows - rows.mean(0)) / np.sqrt(rows.var(0) + norm.eps))
    close(norm.running_mean, 0.1 * rows.mean(0))
    close(norm.running_var, 0.9 + 0.1 * rows.var(0, ddof=1))
    assert torch.isfinite(norm(x[:1, :1], mask[:1, :1])).all()  # one frame has no variance


def test_the_lineages_tcn_sees_no_padding_on_either_side():
    torch.manual_seed(0)
    tcn, x = LineageTCN(3, (4, 4)).eval(), torch.randn(1, 20, 3)
    around = torch.cat([torch.full((1, 9, 3), 1e4), x, torch.full((1, 5, 3), 1e4)], 1)
    mask = ((torch.arange(34) >= 9) & (torch.arange(34) < 29))[None]
    torch.testing.assert_close(tcn(around, mask)[:, 9:29], tcn(x, mask[:, 9:29]), atol=1e-6, rtol=1e-5)
