"""The pack's own shape: what ComfyUI finds when it imports it."""

import asyncio

import stillmotion


def node_classes():
    return asyncio.run(asyncio.run(stillmotion.comfy_entrypoint()).get_node_list())


def test_node_ids_are_ours_and_unique():
    ids = [cls.GET_SCHEMA().node_id for cls in node_classes()]
    assert len(set(ids)) == len(ids)
    assert all(i.startswith("Stillmotion_") for i in ids)
