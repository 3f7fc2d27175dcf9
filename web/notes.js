// The pack's notes on a node are those of its last run: they go away when the node runs again. The page itself never
// removes a node's text, and older Nodes 2.0 do not show one that comes later: in Nodes 2.0 a note is a message, too.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { nodeOf } from "./live.js";
import { removeWidget } from "./preview.js";

const TEXT = "$$node-text-preview"; // the page's name of the widget
const OURS = "Stillmotion: ";

app.registerExtension({
  name: "Stillmotion.Notes",
  setup() {
    api.addEventListener("progress_text", ({ detail }) => {
      if (!detail.text?.startsWith(OURS) || !app.extensionManager.setting.get("Comfy.VueNodes.Enabled")) return;
      const message = { severity: "warn", summary: "Stillmotion", detail: detail.text.slice(OURS.length), life: 30000 };
      app.extensionManager.toast.add(message);
    });
    api.addEventListener("executing", ({ detail }) => {
      const node = detail && nodeOf(String(detail));
      if (node) removeWidget(node, ({ name, value }) => name === TEXT && value?.startsWith(OURS));
    });
  },
});
