"""Log-probabilities of sampled tokens: recording, replay, both estimators, their invariants and refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from models.heads.diffusion import reverse_steps
from models.heads.diffusion_sampler import Trace
from models.masking import cosine_masked_counts
from models.policy.base import (
    Estimator,
    LossInputs,
    Policy,
    PolicyOutput,
    Samples,
    ScoringNoise,
    collect_samples,
    draw_iterations,
)
from models.policy.elbo import ElboEstimator
from models.policy.trajectory import TrajectoryEstimator
from models.sampling.config import SamplingConfig
from models.sampling.sampler import sample
from models.structmar import StructMAR
from tests.helpers import reference
from tests.helpers.structured import generator, some_layout, some_text, structured_model
from util.types import LayoutBatch, TextContext

QUICK = SamplingConfig(num_iter=4, num_sampling_steps=8, t_max=950, clip_x0=2000.0)
ELBO = ElboEstimator(num_iter=4, num_masks=2, num_draws=4)
TRAJECTORY = TrajectoryEstimator(QUICK, num_masks=2)


def sampled(model: StructMAR, config: SamplingConfig = QUICK, seed: int = 3) -> Samples:
    text, layout = some_text(), some_layout()
    output = sample(model, config, [generator(seed), generator(seed + 1)], text, layout, record=True)
    return collect_samples(output, text, layout)


@lru_cache
def world() -> tuple[StructMAR, Samples]:
    """A model (not to be changed) and what it sampled."""
    model = structured_model()
    return model, sampled(model)


def variant(**overrides: Any) -> StructMAR:
    """The same weights in another configuration."""
    model = StructMAR(replace(structured_model().config, **overrides))
    model.load_state_dict(structured_model().state_dict())
    return model.eval()


def every_pass(estimator: Estimator, samples: Samples) -> dict[int, ScoringNoise]:
    """The noise of each iteration, by iteration."""
    passes: dict[int, ScoringNoise] = {}
    for seed in range(100):
        passes |= {noise.iteration: noise for noise in estimator.draw_noise(samples, generator(seed))}
    return dict(sorted(passes.items()))


# recording


def test_recording_changes_nothing_and_keeps_every_state() -> None:
    model, samples = world()
    assert samples.trace is not None
    plain = sample(model, QUICK, [generator(3), generator(4)], some_text(), some_layout())
    assert plain.trace is None
    assert torch.equal(model.patchify(plain.latents), samples.tokens)
    states, log_probs = samples.trace.states, samples.trace.log_probs
    num_steps = len(reverse_steps(8, 950))
    assert states.shape == (2, 64, num_steps + 1, 16) and log_probs.shape == (2, 64, num_steps)
    assert torch.equal(states[:, :, -1], samples.tokens)
    assert (log_probs[:, :, -1] == 0).all() and (log_probs[:, :, :-1] != 0).all()
    # The sampler draws the noise of one iteration after the other: the starting noises come first.
    rng = generator(3)
    order = torch.randperm(64, generator=rng)
    assert torch.equal(order, samples.orders[0])
    counts = cosine_masked_counts(64, 4)
    first = torch.randn(num_steps + 1, counts[0] - counts[1], 16, generator=rng)
    assert torch.equal(states[0, order[counts[1] :].sort().values, 0], first[0])


def test_recording_at_temperature_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature 0"):
        sample(world()[0], replace(QUICK, temperature=0.0), [generator()], record=True)
    with pytest.raises(ValueError, match="temperature 0"):
        TrajectoryEstimator(replace(QUICK, temperature=0.0), num_masks=2)


@pytest.mark.parametrize("num_iter", [4, 7, 16])
def test_inputs_are_rebuilt_from_orders_and_tokens(num_iter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass of the backbone in a rollout: the same visible positions, the same tokens in them."""
    model = structured_model()
    seen: list[tuple[Tensor, Tensor]] = []
    embed = model.encoder_input

    def recording(tokens: Tensor, kept_ids: Tensor, conditions: Any) -> Tensor:
        seen.append((tokens, kept_ids))
        return embed(tokens, kept_ids, conditions)

    monkeypatch.setattr(model, "encoder_input", recording)
    samples = sampled(model, replace(QUICK, num_iter=num_iter, num_sampling_steps=5))
    counts = cosine_masked_counts(64, num_iter)
    assert len(seen) == num_iter
    elbo = every_pass(ElboEstimator(num_iter, num_masks=num_iter, num_draws=2), samples)
    config = replace(QUICK, num_iter=num_iter)
    trajectory = every_pass(TrajectoryEstimator(config, num_masks=num_iter), samples)
    assert list(elbo) == list(trajectory) == list(range(num_iter))
    for iteration, (tokens, kept_ids) in enumerate(seen):
        hidden = torch.ones(2, 64, dtype=torch.bool).scatter(1, kept_ids, False)
        assert torch.equal(tokens, samples.tokens.masked_fill(hidden[..., None], 0.0))
        scored, drawn = elbo[iteration], trajectory[iteration]
        assert torch.equal(scored.kept_ids, kept_ids) and torch.equal(drawn.kept_ids, kept_ids)
        assert torch.equal(torch.zeros_like(hidden).scatter(1, scored.token_ids, True), hidden)
        later = seen[iteration + 1][1] if iteration + 1 < num_iter else torch.arange(64).expand(2, -1)
        unmasked = hidden & torch.zeros_like(hidden).scatter(1, later, True)
        assert torch.equal(torch.zeros_like(hidden).scatter(1, drawn.token_ids, True), unmasked)
        assert drawn.token_ids.shape[1] == counts[iteration] - counts[iteration + 1]


# noise


def test_iterations_are_hit_in_proportion_to_their_tokens() -> None:
    counts = [10, 9, 7, 4, 0]  # unmasks 1, 2, 3, 4
    shared = generator()
    hits = torch.tensor([draw_iterations(counts, 4, shared) for _ in range(2000)])
    shares = torch.bincount(hits.flatten(), minlength=4) / hits.numel()
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.01, rtol=0)
    assert (hits.diff(dim=1) >= 0).all()
    # One token per iteration: each stratum has iterations of its own.
    assert all(len(set(draw_iterations(list(range(8, -1, -1)), 8, shared))) == 8 for _ in range(20))


def test_elbo_draws_are_stratified_and_antithetic() -> None:
    samples = world()[1]
    for noise in ElboEstimator(4, num_masks=3, num_draws=8).draw_noise(samples, generator(1)):
        assert noise.noise is not None and noise.steps is None
        num_masked = cosine_masked_counts(64, 4)[noise.iteration]
        assert noise.timesteps.shape == (2, num_masked, 8) and noise.noise.shape == (2, num_masked, 8, 16)
        assert torch.equal(noise.timesteps[..., :4] // 250, torch.arange(4).expand(2, num_masked, -1))
        assert torch.equal(noise.timesteps[..., :4], noise.timesteps[..., 4:])
        assert torch.equal(noise.noise[:, :, :4], -noise.noise[:, :, 4:])
        assert not torch.equal(noise.noise[:, :, 0], noise.noise[:, :, 1])
        assert len(noise.timesteps[..., 0].unique()) > 10


def test_elbo_scores_the_masks_of_the_rollouts_schedule() -> None:
    for schedule in ("mar", "arccos"):
        passes = every_pass(ElboEstimator(4, schedule=schedule), world()[1])
        counts = replace(QUICK, num_iter=4, schedule=schedule).masked_counts(64)
        assert [noise.token_ids.shape[1] for noise in passes.values()] == counts[:-1]


def test_trajectory_draws_leave_the_ends_out() -> None:
    samples = world()[1]
    steps = reverse_steps(8, 950)
    assert TRAJECTORY.draw_noise(samples, generator(0))[0].steps == (2, 3, 4, 5) and len(steps) == 8
    few = TrajectoryEstimator(QUICK, num_masks=2, num_draws=3)
    chosen = set()
    for seed in range(20):
        for noise in few.draw_noise(samples, generator(seed)):
            assert noise.steps is not None and len(set(noise.steps)) == 3
            assert noise.timesteps[1, 0].tolist() == [steps[step].timestep for step in noise.steps]
            chosen |= set(noise.steps)
    assert chosen == {2, 3, 4, 5}
    default = TrajectoryEstimator(SamplingConfig(num_iter=256))
    told = [default.reverse_steps[step].timestep for step in default.allowed_steps]
    assert (
        len(told) == 96 and max(told) < reverse_steps(100)[1].timestep and min(told) > reverse_steps(100)[-2].timestep
    )


def test_refusals() -> None:
    samples = world()[1]
    for wrong in (5, 0):
        with pytest.raises(ValueError, match=f"num_masks must lie between 1 and num_iter = 4, got {wrong}"):
            ElboEstimator(4, num_masks=wrong)
        with pytest.raises(ValueError, match=f"num_masks must lie between 1 and num_iter = 4, got {wrong}"):
            TrajectoryEstimator(QUICK, num_masks=wrong)
    with pytest.raises(ValueError, match="num_draws must be even and at least 2, got 3"):
        ElboEstimator(4, num_draws=3)
    with pytest.raises(ValueError, match="kappa must be positive, got 0"):
        ElboEstimator(4, kappa=0.0)
    with pytest.raises(ValueError, match="between 1 and the 4 allowed steps, got 5"):
        TrajectoryEstimator(QUICK, num_masks=2, num_draws=5)
    with pytest.raises(ValueError, match="no reverse step is left: 4 steps, 2 skipped"):
        TrajectoryEstimator(SamplingConfig(num_iter=4, num_sampling_steps=4), num_masks=2)
    with pytest.raises(ValueError, match="skipped must be at least 1"):
        TrajectoryEstimator(QUICK, num_masks=2, skipped=0)
    noise = TRAJECTORY.draw_noise(samples, generator())[0]
    with pytest.raises(ValueError, match="no trace"):
        TRAJECTORY.log_probs(world()[0], replace(samples, trace=None), noise)
    with pytest.raises(ValueError, match="another estimator.s: it has reverse steps"):
        ELBO.log_probs(world()[0], samples, noise)
    with pytest.raises(ValueError, match="no reverse steps"):
        TRAJECTORY.log_probs(world()[0], samples, ELBO.draw_noise(samples, generator())[0])


# log-probabilities


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("estimator", [ELBO, TRAJECTORY], ids=["elbo", "trajectory"])
def test_ratio_is_one_until_a_step_is_taken(estimator: Estimator, checkpointing: bool) -> None:
    model = variant(grad_checkpointing=checkpointing, attn_dropout=0.5, proj_dropout=0.5)
    samples = sampled(model)
    calls = []
    model.encoder_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for noise in estimator.draw_noise(samples, generator(5)):
        with torch.no_grad():
            old = estimator.log_probs(model, samples, noise)
        current = estimator.log_probs(model, samples, noise)
        assert old.log_prob.dtype == torch.float32
        assert torch.equal(current.log_prob, old.log_prob)  # dropout is off, too
        assert current.log_prob.requires_grad and not old.log_prob.requires_grad
        for tensor in (*vars(samples.trace).values(), samples.tokens, old.log_prob):
            assert not tensor.is_inference()
        model.zero_grad()
        calls.clear()
        current.log_prob.mean().backward()
        assert len(calls) == int(checkpointing)  # recomputed in backward, in eval mode
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=1e-3 / float(parameter.grad.norm() + 1e-6))
            after = estimator.log_probs(model, samples, noise)
        assert float((after.log_prob - old.log_prob).abs().max()) > 1e-4
        assert float(after.log_prob.mean()) > float(old.log_prob.mean())
        assert not any(module.training for module in model.modules())


def test_checkpointing_does_not_change_gradients() -> None:
    samples = world()[1]
    noise = TRAJECTORY.draw_noise(samples, generator(5))[0]
    gradients = []
    for checkpointing in (False, True):
        model = variant(grad_checkpointing=checkpointing)
        TRAJECTORY.log_probs(model, samples, noise).log_prob.mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert float(gradients[0].abs().max()) > 0


GUIDED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"cfg_text": 3.0, "cfg_layout": 3.0},
    {"cfg_text": 3.0, "cfg_layout": 3.0, "cfg_schedule": "constant", "temperature": 0.8},
    {"cfg_text": 1.5, "cfg_layout": 3.0},
    {"cfg_layout": 3.0, "clip_x0": 2.0},
    {"cfg_text": 1.5, "cfg_layout": 3.0, "guidance_interval": (0.25, 0.75)},
]


@pytest.mark.parametrize("settings", GUIDED, ids=str)
def test_trajectory_recomputes_what_was_recorded(settings: dict[str, Any]) -> None:
    model = world()[0]
    config = replace(QUICK, **settings)
    samples = sampled(model, config)
    assert samples.trace is not None
    estimator = TrajectoryEstimator(config, num_masks=4, skipped=1)
    for noise in every_pass(estimator, samples).values():
        with torch.no_grad():
            output = estimator.log_probs(model, samples, noise)
        assert noise.steps is not None and output.log_std is not None
        rows = torch.arange(2)[:, None]
        stored = samples.trace.log_probs[rows, noise.token_ids][..., list(noise.steps)]
        torch.testing.assert_close(output.log_prob, stored, atol=2e-4, rtol=0)
        after = samples.trace.states[rows, noise.token_ids][:, :, [step + 1 for step in noise.steps]]
        expected = torch.distributions.Normal(output.mean, output.log_std.exp()).log_prob(after).sum(-1)
        torch.testing.assert_close(output.log_prob, expected, atol=1e-3, rtol=1e-4)


def test_only_the_full_branch_gets_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = structured_model(), []
    denoise = model.denoise

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((torch.is_grad_enabled(), kwargs["text"] is not None, kwargs["layout"] is not None))
        return denoise(*args, **kwargs)

    monkeypatch.setattr(model, "denoise", recording)
    estimator = TrajectoryEstimator(replace(QUICK, cfg_text=1.5, cfg_layout=3.0), num_masks=1)
    samples = world()[1]
    estimator.log_probs(model, samples, estimator.draw_noise(samples, generator())[0])
    assert calls == [(True, True, True), (False, True, False), (False, False, False)]


def test_elbo_is_the_denoising_error_of_a_lone_token() -> None:
    """By hand for one token of one image: the head on its own rows, z from the rebuilt input."""
    model, samples = world()
    estimator = replace(ELBO, kappa=0.5)
    noise = estimator.draw_noise(samples, generator(2))[1]
    assert noise.noise is not None
    with torch.no_grad():
        output = estimator.log_probs(model, samples, noise)
        conditions = model.embed_conditions(2, None, samples.text, samples.layout)
        z = model.predict(samples.tokens, noise.kept_ids, model.prepare(conditions))
        token = int(noise.token_ids[1, 3])
        bar = torch.cos((torch.arange(1, 1001) / 1000 + 0.008) / 1.008 * torch.pi / 2).square()
        bar = (bar / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2)).square())[noise.timesteps[1, 3]][:, None]
        own = noise.noise[1, 3]
        noisy = bar.sqrt() * samples.tokens[1, token] + (1 - bar).sqrt() * own
        eps = model.diffloss.net(noisy, noise.timesteps[1, 3], z[1, token].expand(4, -1))[:, :16]
    expected = -0.5 * (eps - own).square().sum() / 4
    torch.testing.assert_close(output.log_prob[1, 3], expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(output.mean[1, 3], eps, atol=1e-3, rtol=1e-3)


def test_shared_draws_make_the_ratio_usable() -> None:
    model, samples = world()
    other = structured_model()
    with torch.no_grad():
        for index, parameter in enumerate(other.parameters()):
            parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=generator(index)))
        first, again = (ELBO.draw_noise(samples, generator(7))[0] for _ in range(2))
        assert torch.equal(first.timesteps, again.timesteps)  # the generator decides
        unshared = every_pass(ELBO, samples)[first.iteration]
        assert not torch.equal(first.timesteps, unshared.timesteps)
        old = ELBO.log_probs(model, samples, first).log_prob
        shared = ELBO.log_probs(other, samples, first).log_prob - old
        apart = ELBO.log_probs(other, samples, unshared).log_prob - old
    assert 0 < float(shared.var()) < 1e-2 * float(apart.var())


def test_batch_mates_do_not_matter() -> None:
    """An image's log-probabilities alone are those it has in a batch."""
    model, samples = world()
    one = slice(1, 2)
    assert samples.text is not None and samples.layout is not None and samples.trace is not None
    alone = Samples(
        samples.tokens[one],
        samples.orders[one],
        samples.grid,
        TextContext(samples.text.tokens[one], samples.text.valid[one], samples.text.pooled[one]),
        LayoutBatch(samples.layout.boxes_xyxy[one], samples.layout.categories[one], samples.layout.valid[one]),
        Trace(samples.trace.states[one], samples.trace.log_probs[one]),
    )
    for estimator in (ELBO, TRAJECTORY):
        noise = estimator.draw_noise(samples, generator(4))[0]
        own = None if noise.noise is None else noise.noise[one]
        its_noise = replace(noise, kept_ids=noise.kept_ids[one], token_ids=noise.token_ids[one],
                            timesteps=noise.timesteps[one], noise=own)  # fmt: skip
        with torch.no_grad():
            whole = estimator.log_probs(model, samples, noise).log_prob[one]
            found = estimator.log_probs(model, alone, its_noise).log_prob
        torch.testing.assert_close(found, whole, atol=1e-3, rtol=1e-4)


def test_subsets_are_unbiased() -> None:
    """Averaged over random passes and steps, the gradient is that of all tokens and allowed steps."""
    model, samples = world()
    bias = model.diffloss.net.final_layer.linear.bias
    gradients = {}
    for iteration, noise in every_pass(replace(TRAJECTORY, num_masks=4), samples).items():
        log_prob = TRAJECTORY.log_probs(model, samples, noise).log_prob.mean((0, 1))
        for step, value in zip(noise.steps or (), log_prob, strict=True):
            gradients[iteration, step] = torch.autograd.grad(value, bias, retain_graph=True)[0]
    counts = cosine_masked_counts(64, 4)
    full = sum(
        gradient * (counts[iteration] - counts[iteration + 1]) / 64 / 4
        for (iteration, _), gradient in gradients.items()
    )
    few, shared = replace(TRAJECTORY, num_draws=2), generator(1)
    drawn = [
        gradients[noise.iteration, step]
        for _ in range(1500)
        for noise in few.draw_noise(samples, shared)
        for step in noise.steps or ()
    ]
    stacked = torch.stack(drawn)
    error = (stacked.mean(0) - full) / (stacked.std(0) / len(drawn) ** 0.5)
    assert float(error.abs().max()) < 4.5
    assert float((stacked.mean(0) - full).norm() / torch.as_tensor(full).norm()) < 0.1


def test_policy_forward() -> None:
    model, samples = world()
    policy = Policy(model, TRAJECTORY)
    noise = TRAJECTORY.draw_noise(samples, generator())[0]
    output = policy(samples, noise)
    assert isinstance(output, PolicyOutput)
    assert torch.equal(output.log_prob, TRAJECTORY.log_probs(model, samples, noise).log_prob)
    noise = model.sample_training_noise(2, generator(1), 0.7)
    inputs = LossInputs(reference.tensors()["train.latents"], noise, text=some_text(), layout=some_layout())
    expected = model(inputs.latents, noise, text=inputs.text, layout=inputs.layout)
    assert torch.equal(policy(inputs), expected)
    with pytest.raises(ValueError, match="need noise"):
        policy(samples)
    assert not ELBO.needs_trace and TRAJECTORY.needs_trace
