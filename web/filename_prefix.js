// %date:yyyy-MM-dd% and %Node.widget% in filename_prefix are filled in when the graph is queued, as the page does for
// core's save nodes; the server fills in the rest.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "Stillmotion.FilenamePrefix",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("Stillmotion_")) return;
    const prefix = node.widgets?.find((widget) => widget.name === "filename_prefix");
    const replace = window.comfyAPI.utils?.applyTextReplacements;
    if (prefix && replace) prefix.serializeValue = () => replace(app, prefix.value);
  },
});
