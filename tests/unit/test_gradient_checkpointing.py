"""Gradient checkpointing of the trainer: the same gradients, in the averaged copy too."""
import torch
from stillmotion.nodes.training.families.registry import checkpoint_blocks
from stillmotion.nodes.video_unet.unet import Block, VideoUNetParams, new_network

PARAMS = VideoUNetParams(channels=4, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, spatial_attention=(1,),
                         head_channels=16, context_dim=8, additional_condition_dim=0)


def unet_loss(net, generator):
    x = torch.randn(1, 9, 3, 4, 4, generator=generator)
    return net(x, torch.tensor([500]), torch.ones(1, 5, 8)).square().mean()


def test_gradient_checkpointing_changes_no_gradient_and_stays_in_the_average():
    def gradients(checkpointed):
        net = new_network(PARAMS, seed=1)
        torch.nn.init.normal_(net.output.weight, generator=torch.Generator().manual_seed(2))
        if checkpointed:
            checkpoint_blocks(net, (Block,))
        unet_loss(net, torch.Generator().manual_seed(0)).backward()
        return net, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    net, plain = gradients(False)
    again, computed = gradients(True)
    assert plain.keys() == computed.keys() and all(torch.equal(plain[name], computed[name]) for name in plain)
    assert again.state_dict().keys() == net.state_dict().keys()
    average = torch.optim.swa_utils.AveragedModel(again)
    for parameter in again.parameters():
        parameter.data.zero_()
    assert unet_loss(average.module, torch.Generator().manual_seed(0)) > 0  # its own weights, not the original's
