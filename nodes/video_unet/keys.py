"""Keys of the video U-Net: the network's own; core's Save Model adds a prefix and marks."""

PREFIX = "model.diffusion_model."  # of core's Save Model
MARKS = {"v_pred", "ztsnr"}        # empty tensors that it adds; our configuration has the same information


def network_tensors(tensors: dict) -> dict:
    """The tensors of a file under the network's keys; the dictionary `tensors` is emptied."""
    found = {key.removeprefix(PREFIX): tensors.pop(key) for key in list(tensors)}
    return {key: value for key, value in found.items() if key not in MARKS}
