"""Noise from counters: the published words, the right distribution, no counter twice, and the same bits however it is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from rsrouter.core import VoteRequest
from rsrouter.core.errors import InputError
from rsrouter.sampling import Engine, Execution, image_identity, make_noise, stream_key
from rsrouter.sampling import philox as module
from rsrouter.sampling.execution import prepare
from rsrouter.sampling.noise import STREAMS, flat, unflat
from rsrouter.sampling.philox import MOST_VOTES, box_muller, normals, philox, stream_words, uniform60, words
from rsrouter.sampling.rounds import Round, draw, lay_out
from tests.sampling.test_engine import SHAPE, images, model, network, requests, votes

CPU = torch.device("cpu")

#: Random123, `kat_vectors`, philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def plain(counter, key, bits=32):
    """Philox4x32-10, or 4x64-10, in Python's integers."""
    m, w = {
        32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
        64: ((0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)),
    }[bits]
    mask, (c0, c1, c2, c3), (k0, k1) = 2**bits - 1, counter, key
    for _ in range(10):
        a, b = m[0] * c0, m[1] * c2
        c0, c1, c2, c3 = (b >> bits) ^ c1 ^ k0, b & mask, (a >> bits) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + w[0]) & mask, (k1 + w[1]) & mask
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_published_words(counter, key, expected):
    c, k, e = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert plain(c, k) == e
    tensors = [torch.tensor([v]) for v in (*c, *k)]
    assert [int(word) for word in philox(tuple(tensors[:4]), tuple(tensors[4:]))] == e


def test_the_reference_is_numpys_philox_at_its_width():
    bits = np.random.Philox(key=12345 + (678 << 64), counter=[5, 6, 7, 8]).random_raw(8).tolist()
    # numpy counts up before it draws
    assert plain((6, 6, 7, 8), (12345, 678), 64) + plain((7, 6, 7, 8), (12345, 678), 64) == bits


def test_words_are_those_of_the_reference_for_any_counter():
    generator = torch.Generator().manual_seed(0)
    names = torch.randint(0, 2**32, (5, 4), generator=generator)
    at = torch.tensor([0, 1, 2**31, 2**32 - 1, 12345])
    found = torch.stack(words(names, at, 3), -1)
    for i, (k0, k1, c2, c3) in enumerate(names.tolist()):
        for block in range(3):
            assert found[i, block].tolist() == plain((block, int(at[i]), c2, c3), (k0, k1))


def test_no_two_values_share_a_counter(monkeypatch):
    """Over streams, votes and blocks of an image; every value has a word of its own in its block, or the two of its pair."""
    seen = set()

    def note(counter, key):
        columns = torch.broadcast_tensors(*counter, *key)
        rows = torch.stack([c.reshape(-1) for c in columns], -1).tolist()
        new = set(map(tuple, rows))
        assert not seen & new
        assert len(new) == len(rows)
        seen.update(new)
        return philox(counter, key)

    monkeypatch.setattr(module, "philox", note)
    names = torch.from_numpy(np.stack([stream_words(stream_key("estimate", 0, i, s)) for i in range(20) for s in range(3)]))
    for start in (0, 50):
        rows = torch.arange(60).repeat_interleave(50)
        normals(names[rows], torch.arange(start, start + 50).repeat(60), 18)
    assert len(seen) == 60 * 100 * 5


def test_every_part_of_a_key_changes_the_stream():
    keys = [stream_key(p, s, i, d) for p in ("select", "estimate") for s in (0, 1) for i in (b"a", b"b") for d in ("x", "y")]
    assert len({tuple(stream_words(k)) for k in keys}) == len(keys)
    assert all(0 <= w < 2**32 for k in keys for w in stream_words(k))


def test_values_are_box_mullers_to_a_millionth():
    generator = torch.Generator().manual_seed(1)
    radius, angle = (torch.randint(0, 2**32, (200_000,), generator=generator) for _ in range(2))
    edges = torch.tensor([0, 1, 2, 2**29, 2**30 - 1, 2**30, 2**31, 3 * 2**30, 2**32 - 257, 2**32 - 1])
    radius, angle = torch.cat([radius, edges.repeat(10)]), torch.cat([angle, edges.repeat_interleave(10)])
    first, second = (v.double() for v in box_muller(radius, angle))
    u = radius.to(torch.float32).double().clamp_min(0.5) / 2.0**32
    length = (-2 * u.log()).sqrt()
    # quarters of the circle are centred on the axes
    turn = (angle >> 30).double() * (np.pi / 2) + ((angle & (2**30 - 1)) - 2**29).double() * (np.pi / 2**31)
    assert torch.isfinite(first).all()
    assert float((first - length * turn.cos()).abs().max()) < 2e-6
    assert float((second - length * turn.sin()).abs().max()) < 2e-6
    assert 6.6 < float(length.max()) < 6.8


def test_a_stream_is_standard_normal_and_its_parts_are_independent():
    rows, numel = 500, 1001
    names = torch.from_numpy(stream_words(stream_key("normal")))[None].expand(rows, 4)
    other = torch.from_numpy(stream_words(stream_key("other")))[None].expand(rows, 4)
    z = normals(names, torch.arange(rows), numel).double().numpy()
    y = normals(other, torch.arange(rows), numel).double().numpy()
    # seeded, so a fixed outcome; a broken transform is off by far more than these levels
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(z[:, 0], "norm").pvalue > 1e-3
    assert stats.kstest((z**2).sum(1), stats.chi2(numel).cdf).pvalue > 1e-3
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        sd = (np.prod(np.arange(1, 4 * power, 2, dtype=float)) ** 0.5) / z.size**0.5
        assert abs((z**power).mean() - moment) < 5 * sd
    tail = (np.abs(z) > 4).sum()
    assert abs(tail - z.size * 2 * stats.norm.sf(4)) < 5 * np.sqrt(z.size * 2 * stats.norm.sf(4))
    pairs = [(z[:, ::2][:, :500], z[:, 1::2]), (z[:-1], z[1:]), (z[:, :-4], z[:, 4:]), (z, y)]
    for a, b in pairs:
        for f in (lambda v: v, np.square, np.abs):  # Box-Muller's pairs share their length
            assert abs(np.corrcoef(f(a).ravel(), f(b).ravel())[0, 1]) < 5 / np.sqrt(a.size)


def test_sixty_uniform_bits():
    names = torch.from_numpy(stream_words(stream_key("bits")))[None].expand(50, 4)
    u = uniform60(names, torch.arange(50), 401)
    assert u.shape == (50, 401)
    assert int(u.min()) >= 0
    assert int(u.max()) < 2**60
    assert stats.kstest(u.double().numpy().ravel() / 2.0**60, "uniform").pvalue > 1e-3
    low = (u & 0xFFFF).double().numpy().ravel() / 2.0**16
    assert stats.kstest(low, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 33, 31)])
@pytest.mark.parametrize("name", ["gaussian", "sound"])
def test_a_row_is_the_same_whatever_its_batch(name, shape):
    noise = make_noise(name, shape, CPU, "counters")
    x = torch.round(torch.rand((2, *shape), generator=torch.Generator().manual_seed(0)) * 255) / 255
    names = torch.from_numpy(np.stack([stream_words(stream_key("row", i)) for i in range(2)]))
    rows = torch.tensor([[0, 0, 0], [1, 7, 0], [2, 0, 2], [0, 2**32 - 1, 0], [1, 8, 0]])

    def fill(which, dtype=torch.float32, layout=torch.contiguous_format):
        out = torch.full((len(which), *shape), 9.0, dtype=dtype).contiguous(memory_format=layout)
        noise.fill(flat(x), names, torch.tensor([0, 1]), rows[which], 0.25, out)
        return out

    whole = fill([0, 1, 2, 3, 4])
    assert torch.equal(fill([3, 1]), whole[[3, 1]])
    assert torch.equal(fill([0, 1, 2, 3, 4], layout=torch.channels_last), whole)
    assert torch.equal(fill([0, 1, 2, 3, 4], torch.bfloat16, torch.channels_last), whole.to(torch.bfloat16))
    assert (whole[2] == 0).all()
    if name == "gaussian":
        z = unflat(normals(names[[1]], torch.tensor([7]), x[0].numel()), shape)
        assert torch.equal(whole[1], x[1] + z[0] * 0.25)
    else:
        assert torch.equal(torch.round(whole * 255) / 255, whole)


def test_a_stream_ends_where_its_counter_does():
    engine = Engine([model(network())], SHAPE, seed=0, execution=Execution(stream="counters", batch=32))
    x = images(1)
    last = engine.run(x, [image_identity(x[0])], [VoteRequest(0, "net", "estimate", MOST_VOTES - 10, 10)])[0]["net"]
    assert last.sum() == 10
    with pytest.raises(InputError, match="stream is exhausted"):
        engine.run(x, [image_identity(x[0])], [VoteRequest(0, "net", "estimate", MOST_VOTES - 10, 11)])


@pytest.mark.parametrize("noise", ["gaussian", "sound", "gaussian-shared"])
def test_votes_from_counters_do_not_depend_on_order_company_or_cuts(noise):
    x, execution = torch.round(images() * 255) / 255, Execution(stream="counters", batch=50)
    engine = Engine([model(network())], SHAPE, seed=0, execution=execution, noise=noise)
    together = votes(engine, x, requests(range(6)))
    assert all(row.sum() == 170 for row in together)
    assert len({tuple(v) for v in together}) > 1
    shuffled = votes(engine, x, requests([3, 1, 5, 0, 2, 4]))
    assert all((shuffled[i] == together[j]).all() for i, j in enumerate([3, 1, 5, 0, 2, 4]))
    alone = votes(engine, x[2:3], requests([0]))
    assert (alone[0] == together[2]).all()
    first, rest = votes(engine, x, requests(range(6), 61)), votes(engine, x, requests(range(6), 109, start=61))
    assert all((a + b == c).all() for a, b, c in zip(first, rest, together, strict=True))
    engine.runner("net").packs = False
    aligned = votes(engine, x, requests(range(6)))
    assert all((a == b).all() for a, b in zip(aligned, together, strict=True))
    assert engine.describe()["stream"] == STREAMS["counters"]


@pytest.mark.parametrize("stream", STREAMS)
def test_votes_of_smaller_batches_are_those_of_whole_ones(stream):
    execution = Execution(batch=64, stream=stream)
    prepared = prepare(network(), execution, CPU, SHAPE)
    x, wanted = images(), requests(range(6), 37)
    found = []
    for smaller in ((), (10, 48)):
        noise = make_noise("gaussian", SHAPE, CPU, stream)
        asked = Round(x, range(6), wanted, [bytes([i]) for i in range(6)], 0.5, (4,), "net", 64, smaller)
        counts, last = draw(asked, lay_out(wanted, 64, True), noise, prepared)
        found.append(counts)
        assert len(last[0]) == (48 if smaller else 64)  # 222 votes: three batches and 30
    assert (found[0][:-1] == found[1][:-1]).all()


def test_both_streams_draw_from_one_distribution():
    x, n = images(1), 4000
    found = [
        votes(Engine([model(network())], SHAPE, seed=0, execution=Execution(stream=s, batch=500)), x, requests([0], n))[0]
        for s in STREAMS
    ]
    assert (found[0] != found[1]).any()
    kept = [row[(found[0] + found[1]) > 10] for row in found]
    assert stats.chi2_contingency(np.stack(kept)).pvalue > 1e-3
