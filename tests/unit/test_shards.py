"""Latent shards: packing round-trips, interrupted packing resumes, corrupt folders are reported."""
import json
import pickle
import sys

import pytest
import torch
from stillmotion.nodes.training.data import shards
from stillmotion.nodes.training.data.clips import MovingShapes
from stillmotion.nodes.training.data.folders import VideoFolder, write_shapes
from stillmotion.nodes.training.data.shards import LatentShards, pack
from torch.utils.data import DataLoader

pytest.importorskip("lmdb")


def halve(video_CTHW):
    """A stand-in VAE: [3, T, H / 4, W / 4]."""
    return torch.nn.functional.avg_pool2d(video_CTHW, 4)


@pytest.fixture
def packed(tmp_path):
    pack(MovingShapes(5, frames=4), tmp_path / "packed", halve, "halve", per_shard=2)
    return tmp_path / "packed"


def test_what_was_packed_is_read_back(packed):
    shapes, read = MovingShapes(5, frames=4), LatentShards(packed)
    assert len(read) == 5 and sorted(path.name for path in packed.iterdir()) == [
        "index.json", "shard_00000", "shard_00001", "shard_00002"]
    for clip, item in zip(shapes, read):
        latent = halve(clip["video"])
        assert torch.equal(item["latent"], latent.half().float()) and item["latent"].dtype == torch.float32
        assert torch.allclose(item["reference"], clip["video"][:, 0], atol=1e-6)
        assert (item["caption"], item["name"]) == (clip["caption"], clip["name"])
    assert "5 packed clips" in read.summary() and "[3, 4, 16, 16] by halve" in read.summary()
    assert len(list(LatentShards(packed, max_samples=3))) == 3
    with pytest.raises(IndexError):
        read[5]


def test_workers_read_each_clip_once(packed):
    read = LatentShards(packed)
    assert torch.equal(read[0]["latent"], LatentShards(packed)[0]["latent"])
    batches = list(DataLoader(read, batch_size=2, num_workers=2, multiprocessing_context="fork"))
    assert [name for batch in batches for name in batch["name"]] == [f"shape_{i:05}" for i in range(5)]
    assert torch.equal(torch.cat([batch["latent"] for batch in batches]), torch.stack([i["latent"] for i in read]))
    assert torch.equal(pickle.loads(pickle.dumps(read))[4]["latent"], read[4]["latent"])


def test_packing_that_was_stopped_goes_on(tmp_path, packed):
    calls = []

    def fails(video):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return halve(video)

    shapes = MovingShapes(5, frames=4)
    with pytest.raises(KeyboardInterrupt):
        pack(shapes, tmp_path / "new", fails, "halve", per_shard=2)
    with pytest.raises(ValueError, match="not packed to its end: run the same command again"):
        LatentShards(tmp_path / "new")
    pack(shapes, tmp_path / "new", fails, "halve", per_shard=2)
    assert len(calls) == 4 + 3  # the complete first shard was kept
    assert all(torch.equal(a["latent"], b["latent"]) for a, b in zip(LatentShards(tmp_path / "new"),
                                                                     LatentShards(packed)))
    pack(shapes, tmp_path / "new", fails, "halve", per_shard=2)
    assert len(calls) == 7


def test_packing_does_not_mix_with_what_is_there(tmp_path, packed):
    with pytest.raises(ValueError, match="count 5, now 6"):
        pack(MovingShapes(6, frames=4), packed, halve, "halve", per_shard=2)
    with pytest.raises(ValueError, match="'halve', now 'other'"):
        pack(MovingShapes(5, frames=4), packed, halve, "other", per_shard=2)
    write_shapes(MovingShapes(2, frames=4), tmp_path / "shapes")
    pack(VideoFolder(tmp_path / "shapes", frames=4), tmp_path / "films", halve, "halve")
    (tmp_path / "shapes" / "captions" / "shape_00001.txt").write_text("another caption")
    with pytest.raises(ValueError, match="begun with clips '2 clips from shapes"):
        pack(VideoFolder(tmp_path / "shapes", frames=4), tmp_path / "films", halve, "halve")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ValueError, match="holds other files"):
        pack(MovingShapes(5, frames=4), tmp_path / "photos", halve, "halve")


def test_latents_that_cannot_be_stored_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shape_00000 is not finite or beyond fp16"):
        pack(MovingShapes(1), tmp_path / "new", lambda video: halve(video) * 1e6, "loud")
    with pytest.raises(ValueError, match="normalised as imagenet"):
        pack(MovingShapes(1, normalise="imagenet"), tmp_path / "new", halve, "halve")
    with pytest.raises(ValueError, match="per_shard = 0"):
        pack(MovingShapes(1), tmp_path / "new", halve, "halve", per_shard=0)


def test_folders_that_cannot_be_read_are_named(tmp_path, packed):
    with pytest.raises(ValueError, match="no folder of packed latents"):
        LatentShards(tmp_path)
    data = packed / "shard_00001" / "data.mdb"
    whole = data.read_bytes()
    data.write_bytes(b"not a data base".ljust(len(whole)))
    assert LatentShards(packed)[1]["name"] == "shape_00001"  # the other shards are not affected
    with pytest.raises(ValueError, match="shard_00001 cannot be read"):
        LatentShards(packed)[2]
    data.write_bytes(whole[:-4096])
    with pytest.raises(ValueError, match="shard_00001/data.mdb is cut off"):
        LatentShards(packed)
    data.unlink()
    with pytest.raises(ValueError, match="shard_00001/data.mdb is missing"):
        LatentShards(packed)


@pytest.mark.parametrize("edits, words", [
    ({"version": 9}, "version 9, this pack reads 1 and 2"), ({"shards": []}, "no list of shards"),
    ({"shards": [3]}, "no list of shards"), ({"version": "2"}, "version is '2'"),
    ({"name": "../other"}, r"name of a shard is '../other'"), ({"name": None}, "name of a shard is None"),
    ({"count": 3}, "there is no record tensors/00000002"), ({"count": -1}, "count is -1"),
    ({"bytes": True}, "bytes is")])
def test_an_edited_index_is_refused(packed, edits, words):
    index = json.loads((packed / "index.json").read_text())
    for name, value in edits.items():
        (index if name in ("version", "shards") else index["shards"][0])[name] = value
    (packed / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words):
        LatentShards(packed)[0]


@pytest.mark.parametrize("text", ["{", "", "[1]", "[" * 100_000])
def test_an_index_that_is_no_index(packed, text):
    (packed / "index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json is damaged"):
        LatentShards(packed)


@pytest.mark.parametrize("place", ["page header", "record"])
def test_changed_bytes_are_an_error_not_the_end(packed, place):
    data = packed / "shard_00000" / "data.mdb"
    film = bytearray(data.read_bytes())
    if place == "record":  # a value in a latent
        at = film.rindex(b"__metadata__") + 3000 if b"__metadata__" in film else film.index(b"latent") + 3000
        film[at] ^= 1
    else:  # page offsets far outside the file
        for page in range(2, len(film) // 4096):
            film[page * 4096 + 16:page * 4096 + 24] = b"\xff" * 8
    data.write_bytes(film)
    with pytest.raises(ValueError, match="shard_00000 cannot be read"):
        LatentShards(packed)[0]


def test_shards_of_the_first_version_are_read(packed, monkeypatch):
    import lmdb
    index = json.loads((packed / "index.json").read_text())
    for shard in index["shards"]:
        path = packed / shard["name"]
        with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
            for key, record in list(transaction.cursor()):
                transaction.put(key, record[4:])
        (path / "lock.mdb").unlink()
        shard["bytes"] = (path / "data.mdb").stat().st_size
    (packed / "index.json").write_text(json.dumps({**index, "version": 1}))
    assert [item["name"] for item in LatentShards(packed)] == [f"shape_{i:05}" for i in range(5)]


def test_a_missing_lmdb_is_named(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match="optional extra .* python -m pip install lmdb"):
        LatentShards(packed)
    with pytest.raises(ImportError, match="lmdb"):
        shards.pack(MovingShapes(1), packed, halve, "halve")
