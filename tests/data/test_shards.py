"""Pairs from WebDataset shards: splitting, shuffling, and the names of broken files."""

from __future__ import annotations

import io
import tarfile
from collections import Counter

import pytest
import torch
from pairs import encoded, photograph, ramp
from torch.utils.data import DataLoader

from sgmim_fast import data

pytest.importorskip("webdataset", reason="reads shards; pip install 'sgmim_fast[train]'")
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores

PER_SHARD = 5
IMAGE, MAP = encoded(photograph(20, 30), "JPEG"), encoded(ramp(20, 30) + 1, "PNG")
NPY = encoded(ramp(20, 30) + 1, "NPY")


def write_shard(path, samples):
    """Writes a tar file from samples: name in the tar -> content."""
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.fixture
def shards(tmp_path):
    for shard in range(4):
        samples = {}
        for number in range(PER_SHARD):
            samples |= {f"{shard}-{number}.jpg": IMAGE, f"{shard}-{number}.depth.png": MAP}
        write_shard(tmp_path / f"{shard}.tar", samples)
    return str(tmp_path / "{0..3}.tar")


def keys(dataset, workers=0, **arguments):
    return [
        item["name"].rpartition("::")[2]
        for item in DataLoader(dataset, batch_size=None, num_workers=workers, **arguments)
    ]


EVERY = sorted(f"{shard}-{number}" for shard in range(4) for number in range(PER_SHARD))


def test_every_pair_once(shards):
    dataset = data.ShardPairs(shards, shuffle=0)
    assert keys(dataset) == EVERY
    item = next(iter(dataset))
    assert torch.equal(item["structure"][0], torch.from_numpy((ramp(20, 30) + 1) / 2**16).float())
    assert item["image"].dtype == torch.float32 and item["skipped"] == ""
    with pytest.raises(TypeError, match="length="):
        len(dataset)


def test_shuffles_by_seed_and_epoch(shards):
    dataset = data.ShardPairs(shards)
    first = keys(dataset)
    assert sorted(first) == EVERY and first != EVERY and first == keys(dataset)
    dataset.set_epoch(1)
    assert sorted(keys(dataset)) == EVERY and keys(dataset) != first
    assert keys(data.ShardPairs(shards, seed=1)) != first


@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0), (2, 2), (4, 1)])
def test_splits_over_processes_and_workers(shards, monkeypatch, processes, workers):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    seen = Counter()
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        seen.update(keys(data.ShardPairs(shards), workers))
    assert seen == Counter(EVERY)


def test_a_length_gives_every_process_as_many(shards, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        for length, workers in ((27, 0), (27, 2), (7, 2)):
            dataset = data.ShardPairs(shards, length=length)
            seen = keys(dataset, workers)
            assert len(seen) == len(dataset) == length // 2
        assert max(Counter(seen).values()) == 1


def test_crops_differ_between_pairs_and_epochs(shards):
    dataset = data.ShardPairs(shards, data.PairTransform(8), shuffle=0)
    first, same = ([item["structure"] for item in dataset] for _ in range(2))
    # Two crops of 8 pixels can be equal by chance.
    assert all(map(torch.equal, first, same)) and not all(torch.equal(first[0], other) for other in first[1:])
    dataset.set_epoch(1)
    assert not all(torch.equal(a, item["structure"]) for a, item in zip(first, dataset, strict=True))


def test_broken_samples_are_skipped_and_named(tmp_path):
    samples = {
        **{"a.jpg": IMAGE, "a.depth.npy": encoded(ramp(20, 30), "NPY")},
        **{"b.jpg": IMAGE[:200], "b.depth.png": MAP},
        **{"c.jpg": IMAGE},
        **{"d.depth.png": MAP},
        **{"e.jpg": IMAGE, "e.depth.png": MAP[:100]},
        **{"f.png": encoded(photograph(20, 30), "PNG"), "f.depth.png": MAP},
    }
    url = write_shard(tmp_path / "x.tar", samples)
    dataset = data.ShardPairs(url, shuffle=0)
    first, second = dataset
    assert first["name"] == f"{url}::a" and first["skipped"] == ""
    assert second["name"] == f"{url}::f"
    expected = [f"{url}::b.jpg", f"{url}::c", f"{url}::d", f"{url}::e.depth.png"]
    assert data.skipped_names([second["skipped"]]) == expected
    assert all(line.count("\t") == 1 and "object at" not in line for line in data.skipped_lines([second["skipped"]]))
    dataset.report.add_skipped(second["skipped"])
    assert list(dataset.report.broken) == expected


def test_a_truncated_shard_is_named(shards, tmp_path):
    path = tmp_path / "1.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        image = tar.getmembers()[4]
    for end in (image.offset_data + 10, image.offset + 10):  # in a file, and in its header
        path.write_bytes(content[:end])
        dataset = data.ShardPairs(shards, shuffle=0)
        assert list(dataset.report.broken) == [str(path)]
        items = list(dataset)
        assert len(items) == 3 * PER_SHARD + 2
        assert end < image.offset_data or any(str(path) in item["skipped"] for item in items)


def test_what_cannot_be_used_says_so(shards, tmp_path):
    unpaired = write_shard(tmp_path / "u.tar", {"a.jpg": IMAGE, "b.jpg": IMAGE})
    for urls, message in (
        (str(tmp_path / "{7..9}.tar"), "3 of 3 shards do not exist"),
        ([], "none given"),
        (unpaired, r"no pair in .*u\.tar: looked for KEY\.jpg .* KEY\.depth\.png .*, found KEY\.jpg"),
        (write_shard(tmp_path / "e.tar", {}), "found no samples"),
    ):
        with pytest.raises(data.DataError, match=message):
            data.ShardPairs(urls)
    with pytest.raises(ValueError, match="length is 0"):
        data.ShardPairs(shards, length=0)
    with pytest.raises(data.DataError, match="4 shards cannot be split over 1 processes with 5 workers"):
        keys(data.ShardPairs(shards), 5)
    dataset = data.ShardPairs([str(tmp_path / "0.tar"), unpaired], length=9)
    with pytest.raises(data.DataError, match="no pair that can be used in 1 shards"):
        keys(dataset, 2)


def test_keys_may_contain_dots(tmp_path):
    """Other data between an image and its map, and names that begin with another key, do not matter."""
    pair = {".camera.json": b"", ".depth.png": MAP, ".json": b"", ".mask.png": MAP, ".png": IMAGE}
    names = ["./d.x/IMG_v1.004", "./d.x/IMG_v1.005", "a.1", "a", "b"]
    members = {name + end: content for name in names for end, content in pair.items()}
    url = write_shard(tmp_path / "x.tar", {"README.md": b"", "._a.png": b"", **members})
    assert keys(data.ShardPairs(url, shuffle=0)) == names
    assert not any(item["skipped"] for item in data.ShardPairs(url, shuffle=0))
    members = {f"{name}{end}": IMAGE for name in names for end in (".jpg", ".semantic.png")}
    assert keys(data.ShardPairs(write_shard(tmp_path / "y.tar", members), structure=None, shuffle=0)) == names
    members = {f"v.{i}{end}": content for i in range(9) for end, content in ((".PNG", IMAGE), (".left.depth.NPY", NPY))}
    url = write_shard(tmp_path / "z.tar", members)
    assert keys(data.ShardPairs(url, structure="left.depth", shuffle=0)) == [f"v.{i}" for i in range(9)]


def test_other_names_of_the_map(tmp_path):
    url = write_shard(tmp_path / "x.tar", {"a.jpg": IMAGE, "a.disparity.png": MAP})
    assert keys(data.ShardPairs(url, structure="disparity")) == ["a"]
