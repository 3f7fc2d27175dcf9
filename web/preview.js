// The preview of a sampling run goes away when the run is done: the video is there then. The page keeps it until the
// node runs again, and its store has no public way to clear it; where it is built otherwise, the preview just stays.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const ours = (node) => node?.comfyClass?.startsWith("Stillmotion_");

function samples(node) {
  const model = node.inputs?.find((input) => input.name === "model");
  return ours(node) || (model?.link != null && ours(node.getInputNode(node.inputs.indexOf(model))));
}

app.registerExtension({
  name: "Stillmotion.Preview",
  setup() {
    api.addEventListener("execution_success", () => {
      const previews = app.extensionManager._p?._s?.get("nodeOutput");
      for (const node of app.graph.nodes.filter(samples)) {
        previews?.revokePreviewsByExecutionId?.(String(node.id));
      }
      app.canvas.setDirty(true, true);
    });
  },
});
