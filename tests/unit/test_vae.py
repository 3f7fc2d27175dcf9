"""The VAE on video latents compared with core's own VAE on single frames."""

import comfy.sd
import comfy.utils
import pytest
import torch
from stillmotion.nodes.common import vae as video_vae

import nodes as core_nodes


def config(mults):
    return {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
            "ch_mult": mults, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}


def weights(mults):
    generator = torch.Generator().manual_seed(1)
    shapes = video_vae.vae_shapes(config(mults), 4)
    return {key: torch.randn(shape, generator=generator) * 0.1 + (1.0 if "norm" in key and "weight" in key else 0.0)
            for key, shape in shapes.items()}


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI runs nodes in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(params=[[1, 1, 2, 2], [1, 2]], ids=["x8", "x2"])
def pair(request):
    """Our VAE and core's, with the same weights."""
    mults = request.param
    plain = comfy.sd.VAE(sd=weights(mults), config={"params": {"ddconfig": config(mults), "embed_dim": 4}})
    return video_vae.VideoVAE(weights(mults), config(mults), 4), plain


@pytest.fixture
def pixels():
    return torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(2))


def close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_encode_gives_one_clip_of_posterior_means(pair, pixels):
    ours, plain = pair
    scale = ours.downscale_ratio
    latent = ours.encode(pixels)
    assert latent.shape == (1, 4, 5, 32 // scale, 48 // scale)
    close(latent[0].movedim(1, 0), torch.cat([plain.encode(frame[None]) for frame in pixels]))
    moments = ours.first_stage_model.quant_conv(ours.first_stage_model.encoder(pixels[:1].movedim(-1, 1) * 2 - 1))
    close(latent[:, :, 0], moments[:, :4])


def test_encode_clips(pair, pixels):
    ours, _ = pair
    close(ours.encode(torch.stack([pixels, pixels.flip(0)])), torch.cat([ours.encode(pixels),
                                                                        ours.encode(pixels.flip(0))]))


def test_decode_frames_like_core(pair):
    ours, plain = pair
    plain.upscale_ratio = plain.downscale_ratio = ours.upscale_ratio
    latent = torch.randn(2, 4, 3, 6, 5, generator=torch.Generator().manual_seed(3))
    frames = latent.movedim(1, 2).flatten(0, 1)
    expected = plain.decode(frames)
    close(ours.decode(latent), expected.unflatten(0, (2, 3)))
    close(ours.decode(frames), expected)
    close(ours.decode_tiled(latent, tile_x=4, tile_y=4, overlap=1, tile_t=8, overlap_t=4),
          plain.decode_tiled(frames, tile_x=4, tile_y=4, overlap=1).unflatten(0, (2, 3)))


def test_core_nodes(pair, pixels):
    ours, _ = pair
    latent = core_nodes.VAEEncode().encode(ours, pixels)[0]
    assert latent["samples"].shape[:3] == (1, 4, 5)
    images = core_nodes.VAEDecode().decode(ours, latent)[0]
    assert images.shape == pixels.shape
    tiled = core_nodes.VAEDecodeTiled().decode(ours, latent, tile_size=512, overlap=64, temporal_size=64)[0]
    close(tiled, images)
    tiled = core_nodes.VAEEncodeTiled().encode(ours, pixels, tile_size=512, overlap=64, temporal_size=64)[0]
    close(tiled["samples"], latent["samples"])


def test_chunks_tick_and_can_be_interrupted(pair, monkeypatch):
    ours, _ = pair
    latent = torch.randn(1, 4, 5, 6, 5, generator=torch.Generator().manual_seed(4))
    whole = ours.decode(latent)
    monkeypatch.setattr(video_vae, "PIXELS_PER_TICK", 2 * 30 * ours.upscale_ratio ** 2)
    ticks = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK",
                        lambda value, total, preview, **_: ticks.append((value, total)))
    close(ours.decode(latent), whole)
    # newer releases show only some of the ticks, always including the first and the last
    assert set(ticks) <= {(2, 5), (4, 5), (5, 5)} and (ticks[0], ticks[-1]) == ((2, 5), (5, 5))

    def stop(value, total, preview, **_):
        raise InterruptedError

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", stop)
    with pytest.raises(InterruptedError):
        ours.decode(latent)


def test_out_of_memory_falls_back_to_tiles(pair, monkeypatch):
    ours, _ = pair
    latent = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    whole = ours.decode(latent)
    decode, failed = ours.first_stage_model.decode, []

    def full_once(frames, **options):
        if not failed:
            failed.append(True)
            raise comfy.model_management.OOM_EXCEPTION("full")
        return decode(frames, **options)

    monkeypatch.setattr(ours.first_stage_model, "decode", full_once)
    close(ours.decode(latent), whole)
    assert failed


@pytest.mark.parametrize("shape", [(1, 16, 3, 8, 8), (1, 8, 8, 8), (4, 8, 8)])
def test_latent_of_another_model(pair, shape):
    with pytest.raises(ValueError, match="another kind of model"):
        pair[0].decode(torch.zeros(shape))
