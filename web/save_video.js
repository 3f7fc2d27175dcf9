// Nodes 2.0 plays whatever a node with a VIDEO input shows, and of no other. GIF and PNG results of Save Video are
// pictures; Block-Autoregressive Sampler to File shows a video.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "Stillmotion.SaveVideo",
  nodeCreated(node) {
    if (!["Stillmotion_SaveVideo", "Stillmotion_BlockAutoregressiveToFile"].includes(node.comfyClass)) return;
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      node.previewMediaType = output.animated?.[0] ? "video" : "image";
      executed?.apply(this, arguments);
    };
  },
});
