// The pack's templates with title, description, moving thumbnail and order from templates.json. ComfyUI's own list of a
// pack's templates has file names alone, in no order, so they join the list of core's templates, which has all of it.
// Where the page lacks one of the two functions, the plain list stays.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const here = new URL("./", import.meta.url);
const pack = decodeURIComponent(here.pathname.split("/").at(-2));

app.registerExtension({
  name: "Stillmotion.Templates",
  init() {
    const { getCoreWorkflowTemplates: core, getWorkflowTemplates: packs } = api;
    if (!core || !packs) return;
    api.getCoreWorkflowTemplates = async (...given) => {
      const [categories, table] = await Promise.all([
        core.apply(api, given),
        fetch(new URL("templates.json", here)).then((answer) => answer.json()),
      ]);
      const templates = table.map((entry) => ({ ...entry, mediaType: "image", mediaSubtype: "webp" }));
      return [...categories, { moduleName: pack, title: "Stillmotion", type: "image", templates }];
    };
    api.getWorkflowTemplates = async (...given) => {
      const { [pack]: ours, ...others } = await packs.apply(api, given);
      return others;
    };
  },
});
