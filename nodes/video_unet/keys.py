"""Keys of the video U-Net: files hold the network's own, those of core's Save Model with a prefix and marks."""

PREFIX = "model.diffusion_model."  # of core's Save Model
MARKS = {"v_pred", "ztsnr"}        # empty tensors by which it says what is in our configuration already


def network_tensors(tensors: dict) -> dict:
    """The tensors of a file by the network's keys; the dictionary `tensors` is emptied."""
    found = {key.removeprefix(PREFIX): tensors.pop(key) for key in list(tensors)}
    return {key: value for key, value in found.items() if key not in MARKS}
