import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pipeline.cluster.pool import ActorPool
from pipeline.data.index import DatasetIndex
from pipeline.errors import InputError
from pipeline.evaluation.bits import held_out_bits
from pipeline.evaluation.reading import read_images
from pipeline.evaluation.work import choose
from pipeline.rng import Choice, Purpose, normal
from tests.evaluation.common import small_model

SEED = 3


def bits_by_hand(index: DatasetIndex, ids: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the terms L_{t-1} and L_T of the small model by the papers' formulas and torch's distributions."""
    model, spec = small_model()
    images, labels = read_images(index, ids)
    x_0 = images.double() / 127.5 - 1
    steps = np.arange(spec.diffusion.timesteps + 1) / spec.diffusion.timesteps
    f = np.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    alpha_bar = np.cumprod(1 - beta)
    terms = []
    for t in range(len(beta)):
        noise = normal(SEED, t, torch.from_numpy(ids), Purpose.BOUND, (1, 8, 8)).double()
        x_t = math.sqrt(alpha_bar[t]) * x_0 + math.sqrt(1 - alpha_bar[t]) * noise
        eps = model(x_t.float(), torch.full((len(ids),), t), labels).double()
        guess = ((x_t - math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(alpha_bar[t])).clamp(-1, 1)
        if t == 0:
            # beta-tilde is zero here. The decoder's mean is the guess, its variance beta-tilde of the next step.
            sigma = math.sqrt(beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1]))
            p = Normal(guess, sigma)
            upper = torch.where(x_0 > 0.999, 1.0, p.cdf(x_0 + 1 / 255))
            lower = torch.where(x_0 < -0.999, 0.0, p.cdf(x_0 - 1 / 255))
            terms.append(-(upper - lower).log())
        else:
            past = alpha_bar[t - 1]
            sigma = math.sqrt(beta[t] * (1 - past) / (1 - alpha_bar[t]))
            mix = math.sqrt(past) * beta[t], math.sqrt(1 - beta[t]) * (1 - past)
            means = [(mix[0] * x + mix[1] * x_t) / (1 - alpha_bar[t]) for x in (x_0, guess)]
            terms.append(kl_divergence(Normal(means[0], sigma), Normal(means[1], sigma)))
    end = Normal(math.sqrt(alpha_bar[-1]) * x_0, math.sqrt(1 - alpha_bar[-1]))
    prior = kl_divergence(end, Normal(0.0, 1.0)).mean().item()
    return np.array([term.mean().item() for term in terms]) / math.log(2), prior / math.log(2)


def test_bound_is_that_of_the_papers_formulas(held_out: DatasetIndex) -> None:
    ids = choose(held_out.rows, 12, 1, Choice.BOUND)
    expected, prior = bits_by_hand(held_out, ids)
    assert np.isfinite(expected).all()
    bits = held_out_bits(*small_model(), held_out, ids, seed=SEED, batch_size=5)
    np.testing.assert_allclose(bits.terms, expected, rtol=1e-3)
    assert bits.prior == pytest.approx(prior, rel=1e-4)
    assert bits.decoder == bits.terms[0]
    assert bits.bits_per_dim == pytest.approx(expected.sum() + prior, rel=1e-4)
    assert (bits.images, bits.terms_stderr) == (12, 0)


def test_an_image_meets_the_same_noise_whatever_the_batch(held_out: DatasetIndex) -> None:
    model, spec = small_model()
    whole = held_out_bits(model, spec, held_out, np.arange(12), batch_size=12)
    parts = [held_out_bits(model, spec, held_out, ids, batch_size=2) for ids in np.split(np.arange(12), 3)]
    assert np.mean([part.bits_per_dim for part in parts]) == pytest.approx(whole.bits_per_dim, rel=1e-5)
    other = held_out_bits(model, spec, held_out, np.arange(12), batch_size=12, seed=1)
    assert other.bits_per_dim != pytest.approx(whole.bits_per_dim, rel=1e-5)


def test_the_estimate_from_some_terms_lies_within_its_error_of_the_exact_bound(
    held_out: DatasetIndex,
) -> None:
    model, spec = small_model(variance="learned_range")
    ids = np.arange(64)
    exact = held_out_bits(model, spec, held_out, ids)
    estimate = held_out_bits(model, spec, held_out, ids, terms=8)
    assert estimate.terms == ()
    assert 0 < estimate.terms_stderr < estimate.stderr
    assert abs(estimate.bits_per_dim - exact.bits_per_dim) < 4 * estimate.terms_stderr
    assert estimate.decoder == pytest.approx(exact.decoder, rel=1e-6)
    assert estimate.prior == pytest.approx(exact.prior, rel=1e-6)


def test_actors_measure_what_one_process_measures(cluster: None, held_out: DatasetIndex) -> None:
    model, spec = small_model()
    ids = choose(held_out.rows, 24, 0, Choice.BOUND)
    here = held_out_bits(model, spec, held_out, ids, batch_size=8)
    one, two = (
        held_out_bits(model, spec, held_out, ids, batch_size=8, pool=ActorPool(actors)) for actors in (1, 2)
    )
    assert one == two
    assert two.bits_per_dim == pytest.approx(here.bits_per_dim, rel=1e-6)
    np.testing.assert_allclose(two.terms, here.terms, rtol=1e-4)


def test_labels_change_the_bound_of_a_conditional_model_only(held_out: DatasetIndex) -> None:
    ids = np.arange(8)
    renamed = replace(held_out, image=replace(held_out.image, classes=tuple("abcdefghij")))
    model, spec = small_model(conditional=False)
    assert held_out_bits(model, spec, renamed, ids) == held_out_bits(model, spec, held_out, ids)
    model, spec = small_model()
    with pytest.raises(InputError, match="classes"):
        held_out_bits(model, spec, renamed, ids)
    assert model.class_embedding is not None
    before = held_out_bits(model, spec, held_out, ids)
    with torch.no_grad():
        model.class_embedding.weight[:10] += 1
    assert held_out_bits(model, spec, held_out, ids) != before


def test_what_cannot_be_measured_is_refused_in_one_line(held_out: DatasetIndex) -> None:
    model, spec = small_model()
    for ids, options, reason in (
        (np.arange(4), {"terms": 7}, "even number"),
        (np.arange(4), {"terms": -2}, "even number"),
        (np.arange(1), {}, "at least two"),
    ):
        with pytest.raises(InputError, match=reason):
            held_out_bits(model, spec, held_out, ids, **options)
    larger = replace(held_out, image=replace(held_out.image, size=16))
    with pytest.raises(InputError, match="--image-size 8"):
        held_out_bits(model, spec, larger, np.arange(4))


def test_chosen_images_are_a_function_of_the_seed() -> None:
    chosen = choose(1000, 50, 4, Choice.BOUND)
    assert len(set(chosen)) == 50
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, choose(1000, 50, 4, Choice.BOUND))
    assert (chosen != choose(1000, 50, 5, Choice.BOUND)).any()
    np.testing.assert_array_equal(choose(7, 0, 4, Choice.BOUND), np.arange(7))
    np.testing.assert_array_equal(choose(7, 9, 4, Choice.BOUND), np.arange(7))
