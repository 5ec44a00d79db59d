"""RQ-VAE: k-means, moving averages, revival and gradients against straightforward float64 or NumPy versions."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.cluster import KMeans

from genrec.models.rqvae import RQVAE, RQVAEConfig, kmeans, load_rqvae, save_rqvae


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model(hidden_sizes=(), sizes=(4, 3), decay=0.5, **settings):
    torch.manual_seed(0)
    config = RQVAEConfig(5, hidden_sizes, 4, sizes, decay=decay, **settings)
    model = RQVAE(config)
    for codebook in model.codebooks:
        codebook.copy_(torch.randn(codebook.shape, generator=generator(1)))
    return model


def test_kmeans_finds_separated_clusters():
    truth = torch.eye(6) * 100
    rows = truth.repeat(20, 1) + torch.randn(120, 6, generator=generator())
    centres = kmeans(rows, 6, generator())
    nearest = torch.cdist(truth, centres)
    assert sorted(nearest.argmin(1).tolist()) == list(range(6))
    assert nearest.min(1).values.max() < 2


def test_kmeans_beats_random_seeds():
    """scikit-learn from random rows, as many steps, on rows with far outliers."""
    rows = torch.randn(800, 16, generator=generator()) ** 3

    def ours(seed):
        return torch.cdist(rows, kmeans(rows, 40, generator(seed))).min(1).values.square().sum().item()

    def theirs(seed):
        return KMeans(40, n_init=1, init="random", max_iter=25, random_state=seed).fit(rows.numpy()).inertia_

    assert sum(map(ours, range(3))) < sum(map(theirs, range(3)))


def test_kmeans_is_a_function_of_the_seed():
    rows = torch.randn(200, 8, generator=generator())
    assert torch.equal(kmeans(rows, 10, generator(3)), kmeans(rows, 10, generator(3)))
    assert not torch.equal(kmeans(rows, 10, generator(3)), kmeans(rows, 10, generator(4)))


@pytest.mark.parametrize("size", [7, 20])
def test_kmeans_with_a_centre_for_every_row(size):
    rows = torch.randn(7, 3, generator=generator())
    centres = kmeans(rows, size, generator())
    assert centres.shape == (size, 3)
    assert torch.equal(centres[:7], rows)
    assert centres.unique(dim=0).shape[0] == size


def test_kmeans_of_fewer_distinct_rows_than_centres():
    rows = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(10, 1)
    centres = kmeans(rows, 5, generator())
    assert centres.isfinite().all()
    assert torch.cdist(rows, centres).min(1).values.max() < 1e-6


def test_identity_without_hidden_layers():
    model = small_model()
    features = torch.randn(9, 5, generator=generator()) * 7 + 3
    model.set_normalisation(features)
    latents = model.encode(features)
    assert latents.mean(0).abs().max() < 1e-6
    assert latents.square().mean().item() == pytest.approx(1)
    torch.testing.assert_close(model.decode(latents), features)
    assert list(model.parameters()) == []
    assert model.config.code_dim == 5


def test_normalisation_of_features_that_are_all_alike():
    model = small_model()
    model.set_normalisation(torch.ones(3, 5))
    assert torch.equal(model.encode(torch.ones(3, 5)), torch.zeros(3, 5))


def test_update_is_the_moving_average_of_the_residuals():
    model = small_model(smoothing=0.1)
    latents = torch.randn(30, 5, generator=generator())
    model.init_codebooks(torch.randn(40, 5, generator=generator(5)), generator())
    codes = model.nearest_codes(latents)
    codes[codes[:, 0] == 2, 0] = 1  # nobody uses code 2 of level 0
    before = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    model.update_codebooks(latents, codes)

    residual = latents.double()
    for level, size in enumerate(model.config.codebook_sizes):
        codebook = model.codebooks[level].double()
        for code in range(size):
            rows = residual[codes[:, level] == code]
            share = 0.5 * before[f"share_{level}"][code] + 0.5 * len(rows) / 30
            total = 0.5 * before[f"sum_{level}"][code] + 0.5 * rows.sum(0) / 30
            expected = total / ((share + 0.1 / size) / 1.1) if len(rows) else before[f"codebook_{level}"][code]
            torch.testing.assert_close(codebook[code], expected, rtol=1e-5, atol=1e-6)
        residual = residual - before[f"codebook_{level}"][codes[:, level]]


def test_without_memory_an_update_is_a_step_of_k_means():
    model = small_model(sizes=(3,), decay=0.0, smoothing=0.0)
    latents = torch.randn(50, 5, generator=generator())
    codes = model.nearest_codes(latents)
    model.update_codebooks(latents, codes)
    for code in codes.unique().tolist():
        torch.testing.assert_close(model.codebooks[0][code], latents[codes[:, 0] == code].mean(0))


def test_a_dead_code_moves_to_the_worst_row():
    model = small_model(sizes=(3,))
    model.codebooks[0].copy_(torch.tensor([[0.0] * 5, [1.0] * 5, [99.0] * 5]))
    latents = torch.tensor([[0.0] * 5, [1.0] * 5, [0.1] * 5, [3.0] * 5])
    revived = model.revive(latents, model.nearest_codes(latents))
    assert revived == 1
    assert torch.equal(model.codebooks[0], torch.tensor([[0.0] * 5, [1.0] * 5, [3.0] * 5]))
    assert model.nearest_codes(latents)[:, 0].tolist() == [0, 1, 0, 2]


def test_nothing_is_revived_where_there_is_nothing_to_gain():
    more_codes_than_rows = small_model(sizes=(8,))
    rows = torch.randn(8, 5, generator=generator())
    assert more_codes_than_rows.revive(rows, torch.zeros(8, 1, dtype=torch.int64)) == 0
    exact = small_model(sizes=(3,))
    rows = exact.codebooks[0][[0, 0, 1, 1]]
    assert exact.revive(rows, torch.tensor([[0], [0], [1], [1]])) == 0


def test_the_straight_through_gradient():
    """The encoder learns as if the decoder had read the latents at the quantised point, plus the commitment."""
    model = small_model(hidden_sizes=(6,), commitment=0.25).double()
    features = torch.randn(10, 5, generator=generator()).double()
    output = model(features)
    output.loss.backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]

    model.zero_grad()
    latents = model.encode(features)
    codes = model.nearest_codes(latents)
    quantized = sum(codebook[codes[:, level]] for level, codebook in enumerate(model.codebooks))
    at = quantized.clone().requires_grad_()
    reconstruction = (model.decode(at) - features).square().mean()
    reconstruction.backward()
    surrogate = (latents * at.grad).sum() + 0.25 * (latents - quantized).square().mean()
    surrogate.backward()
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    assert output.reconstruction_loss.item() == pytest.approx(reconstruction.item())
    assert output.loss.item() == pytest.approx((output.reconstruction_loss + 0.25 * output.commitment_loss).item())


def test_saving_and_loading(tmp_path):
    model = small_model(hidden_sizes=(6,))
    save_rqvae(tmp_path / "a.safetensors", model)
    loaded = load_rqvae(tmp_path / "a.safetensors", model.config)
    save_rqvae(tmp_path / "b.safetensors", loaded)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    features = torch.randn(4, 5, generator=generator())
    assert torch.equal(model.encode(features), loaded.encode(features))


def test_loading_what_is_not_this_model(tmp_path):
    path = tmp_path / "rqvae.safetensors"
    with pytest.raises(FileNotFoundError, match="genrec tokenize"):
        load_rqvae(path, RQVAEConfig())
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_rqvae(path, RQVAEConfig())
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_rqvae(path, RQVAEConfig())


def test_config_survives_json():
    config = RQVAEConfig(hidden_sizes=(7, 8), codebook_sizes=(3, 4))
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in config.to_json().items()}
    assert RQVAEConfig.from_json(values) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook_sizes": ()}, "codebook_sizes is empty"),
        ({"codebook_sizes": (2,) * 27}, "codebook_sizes has 27 levels; expected at most 26"),
        ({"codebook_sizes": (4, 0)}, r"codebook_sizes must hold positive numbers, got \[4, 0\]"),
        ({"hidden_sizes": (-1,)}, "hidden_sizes must hold positive"),
        ({"latent_dim": 0}, "latent_dim must be positive"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"commitment": -1.0}, "commitment must be ≥ 0"),
    ],
)
def test_config_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        RQVAEConfig(**settings)


def test_codes_are_those_of_a_plain_search():
    model = small_model(hidden_sizes=(6,))
    latents = torch.randn(50, 4, generator=generator())
    residual, expected = latents.double().numpy(), []
    for codebook in model.codebooks:
        distances = ((residual[:, None] - codebook.double().numpy()) ** 2).sum(-1)
        expected.append(distances.argmin(1))
        residual = residual - codebook.double().numpy()[expected[-1]]
    assert np.array_equal(model.nearest_codes(latents).numpy(), np.stack(expected, 1))
