// Nodes 2.0 plays whatever a node with a VIDEO input shows; GIF and PNG results of Save Video are pictures.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "Stillmotion.SaveVideo",
  nodeCreated(node) {
    if (node.comfyClass !== "Stillmotion_SaveVideo") return;
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      node.previewMediaType = output.animated?.[0] ? "video" : "image";
      executed?.apply(this, arguments);
    };
  },
});
