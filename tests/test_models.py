"Promises that every model keeps, and those that only SAGE makes."
import numpy as np
import pytest
import torch
from sage_nb.baselines import build_model
from sage_nb.core import DataError
from sage_nb.interaction import Estimator, Head, InteractionStep
from sage_nb.losses import va_loss
from sage_nb.windows import collate, made_up_sequences

SIZES = dict(visual_width=16, audio_width=8)
VISUAL, AUDIO, CUES = 7, 5, 2
MODELS = sorted(Estimator.registry)
FUSIONS = [name for name in MODELS if name not in ("visual", "audio")]
WHOLE_WINDOW = {"jca", "rjca", "grjca", "tagf", "crossmodal", "raav"}  # their fusion looks at all frames at once


def model_of(name, seed=0, **options):
    torch.manual_seed(seed)
    return build_model(name, VISUAL, AUDIO, CUES, cue_owners="va", **SIZES, **options).eval()


def inputs(frames=50, windows=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    ok = [torch.rand(windows, frames, generator=g) > 0.2 for _ in range(2)]
    mask = torch.ones(windows, frames, dtype=torch.bool)
    return dict(visual=torch.randn(windows, frames, VISUAL, generator=g), audio=torch.randn(windows, frames, AUDIO, generator=g),
                visual_ok=ok[0], audio_ok=ok[1], mask=mask, cues=torch.randn(windows, frames, CUES, generator=g))


def per_frame(output):
    return {name: value for name, value in output._asdict().items() if torch.is_tensor(value)}


@pytest.mark.parametrize("name,options", [(n, {}) for n in MODELS] + [
    ("sage", dict(steps=s)) for s in (0, 2, 3)] + [("sage", dict(options)) for options in (
        dict(weighting="gates"), dict(causal=True), dict(fusion="sum"), dict(interaction="attention"), dict(watch_states=True), dict(detached=False))])
def test_every_parameter_gets_a_gradient(name, options):
    "Through the very loss that training uses; a parameter without one would be dead weight in the count."
    sequences, _ = made_up_sequences(8, 0, (60, 80), VISUAL, AUDIO)
    batch = collate(sequences, [(i, 0) for i in range(8)], 60)
    model = model_of(name, **options)
    model.fit_statistics(sequences)
    flags = batch.visual_ok.clone()
    flags[:3, 10:30] = False
    batch = batch._replace(visual_ok=flags)
    for parameter in model.parameters():  # away from zero initial values, behind which nothing moves
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else parameter.data.add_(0.01)
    model.train()
    for _ in range(3):  # the centre of the evidence follows the data
        output = model(*batch.inputs)
    loss = va_loss(output.va, batch.va, batch.valid[..., None]) + sum(model.extra_loss(output, batch.va, batch.valid).values())
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [1, 37])
def test_padding_changes_nothing(name, padding):
    model, given = model_of(name), inputs()
    longer = {}
    for key, value in given.items():
        filler = torch.zeros(3, padding, dtype=torch.bool) if key == "mask" else (
            torch.ones(3, padding, dtype=torch.bool) if value.dtype == torch.bool else torch.full((3, padding, value.shape[2]), 1e4))
        longer[key] = torch.cat([value, filler], 1)
    short, long = per_frame(model(**given)), per_frame(model(**longer))
    for key in short:
        torch.testing.assert_close(long[key][:, :50], short[key], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value", [1e30, float("nan"), float("inf")])
def test_features_of_a_missing_modality_change_nothing(name, value):
    model, given = model_of(name), inputs()
    before = per_frame(model(**given))
    given["visual"] = torch.where(given["visual_ok"][..., None], given["visual"], value)
    given["audio"] = torch.where(given["audio_ok"][..., None], given["audio"], value)
    given["cues"] = torch.where(torch.stack([given["visual_ok"], given["audio_ok"]], -1), given["cues"], value)  # its cues neither
    for key, after in per_frame(model(**given)).items():
        assert torch.equal(after, before[key])


@pytest.mark.parametrize("name", MODELS)
def test_sequences_of_a_batch_do_not_see_each_other(name):
    model, given = model_of(name), inputs()
    alone = per_frame(model(**{key: value[:1] for key, value in given.items()}))
    for key, together in per_frame(model(**given)).items():
        torch.testing.assert_close(together[:1], alone[key], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("frames", [1, 2, 61, 977])
def test_any_length(name, frames):
    output = model_of(name)(**inputs(frames, 1))
    assert output.va.shape == (1, frames, 2)
    assert all(torch.isfinite(value.float()).all() for value in per_frame(output).values()) and output.va.abs().max() <= 1


@pytest.mark.parametrize("name", sorted(WHOLE_WINDOW))
def test_a_fusion_of_the_whole_window_cannot_be_causal(name):
    with pytest.raises(DataError, match="causal"):
        model_of(name, causal=True)


@pytest.mark.parametrize("name,options", [(name, {}) for name in MODELS if name not in WHOLE_WINDOW] + [("sage", dict(interaction="attention"))])
def test_causal_models_do_not_see_the_future(name, options):
    model, given = model_of(name, causal=True, **options), inputs()
    later = {key: value.clone() for key, value in given.items()}
    for key in ("visual", "audio", "cues"):
        later[key][:, 30:] += 1
    later["visual_ok"][:, 30:] = ~later["visual_ok"][:, 30:]
    before, after = per_frame(model(**given)), per_frame(model(**later))
    for key in before:
        torch.testing.assert_close(after[key][:, :30], before[key][:, :30], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(after["va"][:, 30:], before["va"][:, 30:])


@pytest.mark.parametrize("name,changes", [("visual", (True, False)), ("audio", (False, True))] + [(n, (True, True)) for n in FUSIONS])
def test_a_model_uses_the_modalities_it_names(name, changes):
    model, given = model_of(name), inputs()
    before = model(**given).va
    for key, changed in zip(("visual", "audio"), changes):
        assert torch.equal(model(**given | {key: given[key] + 1}).va, before) is not changed
    for cue, changed in enumerate(changes):  # cue 0 is about sight, cue 1 about sound
        moved = given["cues"].clone()
        moved[..., cue] += 1
        assert torch.equal(model(**given | {"cues": moved}).va, before) is not changed


def test_the_head_drops_channels_and_never_a_frame():
    head = Head(4, hidden=64, dropout=0.5).train()
    x = torch.randn(2, 200, 4)
    assert not (head(x) == torch.tanh(head.out.bias)).all(-1).any()
    hidden = torch.nn.functional.gelu(head.hidden(x))
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(torch.ones(2, 1, 64), 0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(head(x), torch.tanh(head.out(hidden * kept)))


def test_defaults_of_the_masks():
    model, given = model_of("sage"), inputs()
    everywhere = torch.ones(3, 50, dtype=torch.bool)
    full = model(given["visual"], given["audio"], everywhere, everywhere, everywhere, given["cues"]).va
    assert torch.equal(model(given["visual"], given["audio"], cues=given["cues"]).va, full)


def test_standardisation_is_of_ok_frames():
    sequences, _ = made_up_sequences(3, 0, (60, 80), VISUAL, AUDIO)
    for s in sequences:
        s.visual_ok = np.arange(len(s)) > 20
        s.visual[:21] = 1e6  # no face: what stands here is nobody's feature
    model = model_of("concat")
    model.fit_statistics(sequences)
    seen = np.concatenate([s.visual[s.visual_ok] for s in sequences]).astype(np.float64)
    np.testing.assert_allclose(model.front.scale["visual"].mean, seen.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.front.scale["visual"].std, seen.std(0), rtol=1e-4)


@pytest.mark.parametrize("key,size", [("visual", VISUAL + 1), ("audio", AUDIO - 1), ("cues", CUES + 2)])
def test_wrong_sizes_are_named(key, size):
    with pytest.raises(DataError, match=f"{key}: the model was built for .* got {size}"):
        model_of("sage")(**inputs() | {key: torch.zeros(3, 50, size)})


def test_unknown_names_are_named():
    with pytest.raises(DataError, match="sega.*audio, can, .*sage"):
        build_model("sega", VISUAL, AUDIO)
    with pytest.raises(DataError, match="configuration 'huge'"):
        build_model("sage", VISUAL, AUDIO, configuration="huge")
    with pytest.raises(DataError, match="weighting: 'sum'"):
        build_model("sage", VISUAL, AUDIO, weighting="sum")


# what only SAGE promises


def set_evidence(model, low=None):
    "Make the branch say the same of every modality, stage and frame, or less of one modality."
    for m, judge in enumerate(model.branch.judges):
        torch.nn.init.zeros_(judge.log_var.weight)
        torch.nn.init.constant_(judge.log_var.bias, 0.0 if m == low else -2.0)
    said = model(**inputs() | dict(visual_ok=None, audio_ok=None)).raw_readout_log_var[0, 0, 0 if low != 0 else 1, 0]
    evidence = (model.branch.label_variance / said.exp() - 1).clamp(min=model.branch.floor).log().mean()
    model.branch.centre.fill_(evidence.item())


@pytest.mark.parametrize("weighting", ["gates", "shares"])
@pytest.mark.parametrize("steps", [0, 2])
def test_equal_confidence_is_plain_concatenation(weighting, steps):
    model = model_of("sage", weighting=weighting, steps=steps)
    set_evidence(model)
    seen = []
    model.head.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    states = []
    for step in model.interaction:
        step.register_forward_hook(lambda _, given, out: states.append(out))
    output = model(**inputs() | dict(visual_ok=None, audio_ok=None))
    torch.testing.assert_close(output.weights, torch.full_like(output.weights, 1 / (steps + 1)), atol=1e-5, rtol=0)
    given = inputs()
    ok = torch.ones(3, 50, 2, dtype=torch.bool)
    first, _ = model.front(given["visual"], given["audio"], ok, given["mask"], given["cues"])
    mean = torch.cat([sum(stage[m] for stage in [first, *states]) / (steps + 1) for m in range(2)], -1)
    torch.testing.assert_close(seen[0][..., : mean.shape[-1]], mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weighting", ["gates", "shares"])
@pytest.mark.parametrize("low", [0, 1])
def test_doubt_takes_weight_away(weighting, low):
    model = model_of("sage", weighting=weighting)
    set_evidence(model, low)
    weights = model(**inputs() | dict(visual_ok=None, audio_ok=None)).weights.sum(-1)
    assert (weights[..., low] < 0.9).all() and (weights[..., 1 - low] > 1 - 1e-4).all()


@pytest.mark.parametrize("weighting", ["gates", "shares"])
def test_a_missing_modality_weighs_exactly_nothing(weighting):
    given = inputs()
    given["audio_ok"][0] = False  # no sound at all
    given["visual_ok"][1, :10] = given["audio_ok"][1, :10] = False  # nothing at all, for a while
    output = model_of("sage", weighting=weighting)(**given)
    ok = torch.stack([given["visual_ok"], given["audio_ok"]], -1)
    assert (output.weights[~ok] == 0).all() and (output.reliability[~ok] == 0).all() and (output.weights[ok] > 0).all()


def test_the_branch_sends_no_gradient_into_the_representation():
    model, given = model_of("sage"), inputs()
    model.train()
    output = model(**given)
    terms = model.extra_loss(output, torch.rand(3, 50, 2) - 0.5, given["mask"], torch.rand(3, 50, 2) > 0.5)
    representation = [*model.front.parameters(), *model.interaction.parameters(), *model.readouts.parameters(), *model.head.parameters()]
    for name in ("likelihood", "order", "known", "variance"):
        gradients = torch.autograd.grad(terms[name], representation, retain_graph=True, allow_unused=True)
        assert all(g is None for g in gradients), name
    gradients = torch.autograd.grad(terms["readout"], list(model.front.parameters()), retain_graph=True)
    assert all(g.abs().sum() > 0 for g in gradients)  # while the readouts do train it
    gradients = torch.autograd.grad(terms["likelihood"] + terms["order"], list(model.branch.parameters()), retain_graph=True)
    assert all(g.abs().sum() > 0 for g in gradients)
    fusion = torch.autograd.grad(output.va.sum(), list(model.branch.parameters()), allow_unused=True)
    assert all(g is None for g in fusion)  # and the task cannot bend the estimate of reliability


def test_outputs_keep_their_bounds():
    output = model_of("sage")(**inputs())
    assert output.log_var.shape == (3, 50, 2) and output.reliability.shape == output.weights.shape == (3, 50, 2, 2)
    assert (output.log_var.exp() <= 1.01 - output.va.square() + 1e-6).all()
    assert (output.reliability >= 0).all() and (output.reliability <= 1).all()


def test_unlabelled_frames_train_nothing():
    model, given = model_of("sage"), inputs()
    va, valid = torch.rand(3, 50, 2) - 0.5, torch.rand(3, 50) > 0.4
    output = model(**given)
    before = model.extra_loss(output, va, valid)
    after = model.extra_loss(output, torch.where(valid[..., None], va, float("nan")), valid)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_modality_that_is_not_trusted_is_a_modality_that_is_missing():
    "What a doubtful modality says reaches nobody, however loud; where trust scales the input too, not even its own state."
    model, given = model_of("sage", gated_input=True), inputs()
    set_evidence(model, 0)
    model.confidence.alpha.data.fill_(1e3)  # doubt becomes certainty
    loud = model(**given | dict(visual=given["visual"] * 1e3))
    torch.testing.assert_close(loud.va, model(**given).va, atol=1e-5, rtol=0)
    with torch.no_grad():
        plain = model_of("sage")
        set_evidence(plain, 0)
        plain.confidence.alpha.data.fill_(1e3)
        changed = (plain(**given | dict(visual=given["visual"] * 1e3)).readouts - plain(**given).readouts).abs().max()
        other = (plain(**given | dict(visual=given["visual"] * 1e3)).readouts - plain(**given).readouts)[:, :, 1].abs().max()
    assert changed > 0.1 and other < 1e-5


@pytest.mark.parametrize("reliability", ["shared", "constant", "none"])
def test_switches_of_reliability(reliability):
    model, given = model_of("sage", reliability=reliability, steps=2), inputs()
    full = model_of("sage", steps=2)
    full.load_state_dict(model.state_dict())
    weights, usual = model(**given).weights, full(**given).weights
    there = weights > 0
    if reliability == "none":
        both = there.all(2, keepdim=True)
        torch.testing.assert_close(weights[both.expand_as(weights)], torch.full_like(weights[both.expand_as(weights)], 1 / 3))
    elif reliability == "shared":
        torch.testing.assert_close(weights, weights[..., :1].expand_as(weights))
    else:
        both = there.all(-1).all(-1)
        for b in range(3):
            torch.testing.assert_close(weights[b][both[b]], weights[b][both[b]][:1].expand_as(weights[b][both[b]]))
    assert not torch.allclose(weights, usual)


def test_what_a_branch_watches():
    "Cues where there are some; detached states where there are none, or where it is asked for."
    given = inputs()
    output = model_of("sage")(**given)
    louder = model_of("sage")(**given | dict(visual=given["visual"] * 3))
    assert torch.equal(output.reliability, louder.reliability) and not torch.equal(output.va, louder.va)
    watching = model_of("sage", watch_states=True)
    assert not torch.equal(watching(**given).reliability, watching(**given | dict(visual=given["visual"] * 3)).reliability)
    torch.manual_seed(0)
    blind = build_model("sage", VISUAL, AUDIO, **SIZES).eval()
    given.pop("cues")
    assert blind.branch.watches_states and blind(**given).reliability[given["visual_ok"]][:, 0].std() > 0


def test_conformal_intervals_count_people_not_frames():
    "One person who is filmed for long with large errors must not widen the interval as if it were many; nine of one person are one."
    model = model_of("sage")
    given = inputs(frames=60, windows=10)
    with torch.no_grad():
        output = model(**given | dict(visual_ok=None, audio_ok=None))
    noise = torch.full((10, 60, 2), 0.1)
    noise[0] = 0.9
    valid = torch.ones(10, 60, dtype=torch.bool)
    valid[1:, 6:] = False  # nine short videos, one long
    one_each = [f"person {i}" for i in range(10)]
    model.calibrate_output([output], [output.va + noise], [valid], [one_each])
    with torch.no_grad():
        width = model(**given | dict(visual_ok=None, audio_ok=None)).half_width
    covered = (noise <= width + 1e-6)[valid]
    assert covered.float().mean() > 0.4 and (noise[1:] <= width[1:] + 1e-6)[valid[1:]].all()
    model.calibrate_output([output], [output.va + noise], [valid], [["the long one"] + ["one person in nine videos"] * 9])
    assert (model.quantile * (output.log_var / 2).exp() > 0.89).all(-1)[0].any()  # now half of the people err that much


def test_labels_that_do_not_count_may_be_nan():
    model, given = model_of("sage"), inputs()
    with torch.no_grad():
        output = model(**given)
    va, valid = torch.rand_like(output.va) - 0.5, given["mask"] & (torch.arange(output.va.shape[1]) % 3 > 0)
    found = []
    for filler in (0.0, torch.nan):
        model.calibrate([output], [torch.where(valid[..., None], va, filler)], [valid])
        model.calibrate_output([output], [torch.where(valid[..., None], va, filler)], [valid], [["a", "b", "c", "d"][: len(va)]])
        found.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(v.isfinite().all() and torch.equal(v, found[0][k]) for k, v in found[1].items())


def test_alone_an_estimate_speaks_at_its_own_gain():
    "Where a modality is missing throughout, and nowhere else, the estimate is scaled; the gain is the one that concords best."
    model, given = model_of("sage"), inputs()
    given["visual_ok"][0] = False
    with torch.no_grad():
        before = model(**given).va
        truth, valid = torch.tanh(2 * torch.atanh(before)), given["mask"].clone()
        model.calibrate_alone(0, [model(**given)], [truth], [valid])
        after = model(**given).va
    torch.testing.assert_close(model.alone[0], torch.full((2,), 2.0), rtol=0.06, atol=0)
    torch.testing.assert_close(after[0], torch.tanh(model.alone[0] * torch.atanh(before[0])))
    assert torch.equal(after[1:], before[1:]) and (model.alone[1] == 1).all()


def test_a_trust_that_is_low_throughout_does_not_cancel_in_the_memory():
    step = InteractionStep((6, 4)).eval()
    states, much = [torch.randn(1, 60, 6), torch.randn(1, 60, 4)], torch.ones(1, 60, 2)
    with torch.no_grad():
        step.recall.weight[:, 2 * step.dim :: 2 * step.dim + 2] = 0  # amounts are known and may be used; here only what was said counts
        step.recall.weight[:, 2 * step.dim + 1 :: 2 * step.dim + 2] = 0
        step.recall.bias.zero_()
        moved = [(a - b).norm() for a, b in zip(step(states, much), states)]
        moved_less = [(a - b).norm() for a, b in zip(step(states, 0.1 * much), states)]
    assert all(less < 0.15 * more for less, more in zip(moved_less, moved))


def test_the_mean_over_a_window_cannot_be_causal():
    with pytest.raises(DataError, match="constant is a mean over the whole window"):
        model_of("sage", causal=True, reliability="constant")
