// The pack's notes on a node are those of its last run: they go away when the node runs again. The page itself never
// removes a node's text.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { nodeOf } from "./live.js";

const TEXT = "$$node-text-preview"; // the page's name of the widget

app.registerExtension({
  name: "Stillmotion.Notes",
  setup() {
    api.addEventListener("executing", ({ detail }) => {
      const node = detail && nodeOf(String(detail));
      const index = node?.widgets?.findIndex(({ name, value }) => name === TEXT && value?.startsWith("Stillmotion: "));
      if (!(index >= 0)) return;
      node.widgets[index].onRemove?.();
      node.widgets.splice(index, 1);
      node.setDirtyCanvas?.(true, true);
    });
  },
});
