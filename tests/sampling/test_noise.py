"""Streams: keyed, independent of how they are cut, the right distribution; sound noise exact on the grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from rsrouter.core.errors import InputError
from rsrouter.sampling.noise import CHUNK, GaussianNoise, SoundNoise, check_eight_bit, make_noise, stream_key

CPU = torch.device("cpu")


def draw(noise, image, key, start, count, sigma=0.5):
    out = torch.empty((count, *image.shape))
    bad = noise.add(image, sigma, key, start, out)
    return out, bad


@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 33, 31)])  # shorter than a vector register; odd, and split among threads
@pytest.mark.parametrize("name", ["gaussian", "sound"])
def test_any_cut_of_a_stream_is_the_same(name, shape):
    image, key = torch.full(shape, 0.2), stream_key("cut")
    whole, _ = draw(make_noise(name, shape, CPU), image, key, 0, 3 * CHUNK + 7)
    for start, count in [(0, 1), (CHUNK - 1, 2), (CHUNK, CHUNK), (17, 2 * CHUNK), (3 * CHUNK, 7)]:
        part, _ = draw(make_noise(name, shape, CPU), image, key, start, count)
        assert torch.equal(part, whole[start : start + count])


def test_keys_do_not_collide_when_parts_are_shifted():
    assert stream_key("ab", "c") != stream_key("a", "bc")
    assert stream_key("a", "") != stream_key("a")


def test_gaussian_noise_is_standard_normal_and_streams_differ():
    shape = (2, 15, 15)
    a, _ = draw(GaussianNoise(shape, CPU), torch.zeros(shape), stream_key("a"), 0, 10 * CHUNK, sigma=1.0)
    b, _ = draw(GaussianNoise(shape, CPU), torch.zeros(shape), stream_key("b"), 0, 10 * CHUNK, sigma=1.0)
    values = a.flatten().numpy().astype(np.float64)
    # seeded, so a fixed outcome; a broken transform is off by far more than these levels
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(values, b.flatten().numpy())[0, 1]) < 4 / np.sqrt(values.size)
    # the two halves of Box-Muller share their radius, not their value
    half = values.reshape(10, -1)
    first, second = half[:, : half.shape[1] // 2].ravel(), half[:, half.shape[1] // 2 :].ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(first.size)


def test_gaussian_noise_is_finite_for_every_word(monkeypatch):
    """The radius of the word that is all zeros after shifting was infinite: one vote in ten thousand at 3 x 32 x 32."""
    words = np.array([0, 255, 256, 2**31 - 1, 2**31, 2**31 + 255, 2**32 - 1], dtype=np.uint64)
    monkeypatch.setattr(
        "rsrouter.sampling.noise._raw_bits", lambda key, chunk, count: np.resize(words << np.uint64(32) | words, count)
    )
    noise = GaussianNoise((1, 1, 7), CPU)._make(b"", 0, 1.0)
    assert torch.isfinite(noise).all()
    assert 5.5 < noise.abs().max() < 6.0


def test_more_than_32_bits_of_the_key_count():
    """torch's CPU generator keeps 32 bits of its seed; our chunks must not."""
    keys = [stream_key(i) for i in range(2000)]
    noise = GaussianNoise((1, 1, 1), CPU)
    firsts = {noise._make(k, 0, 1.0)[0].item() for k in keys}
    assert len(firsts) == len(keys)


def test_sound_noise_gives_a_grid_point_one_bit_pattern_whatever_the_input():
    """Different images reach the same pixel value: it must be the same float, which division after the sum ensures."""
    seen: dict[int, set[int]] = {}
    for k in (0, 1, 77, 128, 254, 255):
        image = torch.full((1, 4, 4), k / 255.0)
        out, bad = draw(SoundNoise((1, 4, 4), CPU), image, stream_key("grid", k), 0, 4 * CHUNK)
        assert not bad.any()
        for value in out.flatten().tolist():
            bits = int(np.float32(value).view(np.int32))
            seen.setdefault(round(value * 255), set()).add(bits)
    assert len(seen) > 200
    assert all(len(patterns) == 1 for patterns in seen.values())


def test_sound_noise_is_the_rounded_gaussian():
    sigma, image = 0.25, torch.full((1, 20, 20), 100 / 255.0)
    out, _ = draw(SoundNoise((1, 20, 20), CPU), image, stream_key("dist"), 0, 10 * CHUNK, sigma=sigma)
    steps = np.rint(out.numpy().ravel() * 255).astype(int) - 100
    edges = np.arange(-150, 151, 20)
    expected = np.diff(stats.norm.cdf((edges - 0.5) / (255 * sigma)))
    found = np.histogram(steps, bins=edges - 0.5)[0]
    inside = found.sum()
    assert stats.chisquare(found, expected / expected.sum() * inside).pvalue > 1e-3


def test_sound_noise_clamps():
    image = torch.full((1, 8, 8), 1.0)
    out, _ = draw(SoundNoise((1, 8, 8), CPU), image, stream_key("clamp"), 0, 20 * CHUNK, sigma=1.0)
    assert out.min() >= -6.0
    assert out.max() <= 7.0


def test_sound_noise_refuses_images_off_the_grid():
    with pytest.raises(InputError, match="8-bit"):
        check_eight_bit(torch.full((1, 1, 2, 2), 0.5))
    with pytest.raises(InputError, match="8-bit"):
        check_eight_bit(torch.full((1, 1, 2, 2), float("nan")))
    check_eight_bit(torch.full((1, 1, 2, 2), 51 / 255.0))


def test_unknown_noise():
    with pytest.raises(InputError, match="Unknown noise"):
        make_noise("uniform", (1, 2, 2), CPU)
