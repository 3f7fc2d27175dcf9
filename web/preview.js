// The preview of a run goes away when the run is done: its result is there then, or the node's own pictures are. The page
// keeps it until the node runs again, and its store has no public way to clear it; where it is built otherwise, the
// preview just stays. A classic node that grew to show it gets its height back.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const ours = (node) => node?.comfyClass?.startsWith("Stillmotion_");

function samples(node) {
  const model = node.inputs?.find((input) => input.name === "model");
  return ours(node) || (model?.link != null && ours(node.getInputNode(node.inputs.indexOf(model))));
}

export function removeWidget(node, fits) {
  const index = node.widgets?.findIndex(fits) ?? -1;
  if (index < 0) return;
  node.widgets[index].onRemove?.();
  node.widgets.splice(index, 1);
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "Stillmotion.Preview",
  setup() {
    const heights = new Map();
    api.addEventListener("execution_start", () => {
      for (const node of app.graph.nodes.filter(samples)) heights.set(node.id, node.size[1]);
    });
    api.addEventListener("execution_success", () => {
      const previews = app.extensionManager._p?._s?.get("nodeOutput");
      for (const node of app.graph.nodes.filter(samples)) {
        if (!app.nodePreviewImages[node.id]?.length || !previews?.setNodePreviewsByNodeId) continue;
        previews.setNodePreviewsByNodeId(node.id, []);
        // a classic node draws what it has loaded until it sees that there is something else
        removeWidget(node, ({ name }) => name === "$$canvas-image-preview");
        node.imgs = node.images = undefined;
        const shown = app.nodeOutputs?.[node.id]?.images;  // the node's own pictures may need the height
        if (!shown && node.size[1] > heights.get(node.id)) node.setSize?.([node.size[0], heights.get(node.id)]);
      }
      app.canvas.setDirty(true, true);
    });
  },
});
