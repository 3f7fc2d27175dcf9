"""Read every record of a shard in a separate process: a damaged LMDB file can crash the process that reads it.

    python check_shard.py SHARD COUNT VERSION

Exits with 0 if the shard is good, otherwise prints what is wrong. Imports nothing from the pack, so it starts fast.
"""
import sys
import zlib

import lmdb

CHECKSUM = 4  # bytes at the start of a record, since version 2


def keys(number):
    """Keys of a clip's records: its tensors and its text."""
    return b"tensors/%08d" % number, b"text/%08d" % number


def sealed(record):
    return zlib.crc32(record).to_bytes(CHECKSUM, "big") + record


def opened(record, version):
    """The record without its checksum; ValueError if the checksum does not match."""
    if version == 1:
        return record
    if sealed(record[CHECKSUM:]) != record:
        raise ValueError("a record differs from its checksum")
    return record[CHECKSUM:]


def read(shard, wanted, version):
    """Records by key. ValueError for a missing or damaged record, lmdb.Error for a damaged file."""
    with lmdb.open(shard, readonly=True, lock=False, readahead=False, create=False) as environment:
        with environment.begin() as transaction:
            found = [transaction.get(key) for key in wanted]
    for key, record in zip(wanted, found):
        if record is None:
            raise ValueError(f"there is no record {key.decode()}")
    return [opened(record, version) for record in found]


if __name__ == "__main__":
    try:
        for clip in range(int(sys.argv[2])):
            read(sys.argv[1], keys(clip), int(sys.argv[3]))
    except (ValueError, lmdb.Error) as problem:
        sys.exit(str(problem))
