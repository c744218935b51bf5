// The gallery of Load Character and Save Character: a button on the node, a dialog with the saved characters.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const ROUTE = "/instantcharacter/characters"; // instantcharacter/comfyui/library.py
const NODES = {
  InstantCharacterLoadCharacter: (name) => name,
  InstantCharacterSaveCharacter: (name) => name.replace(/\.safetensors$/, ""),
}; // what the node's widget "name" has for a character's file

const TEXTS = {
  en: {
    gallery: "gallery",
    title: "Characters",
    filter: "Filter by name",
    none: "No characters in models/characters yet: Save Character makes one.",
    adapter: "adapter",
    delete: "Delete",
    really: "Delete for good?",
    close: "Close",
  },
  zh: {
    gallery: "角色库",
    title: "角色",
    filter: "按名称筛选",
    none: "models/characters 中还没有角色：用“保存角色”保存一个。",
    adapter: "适配器",
    delete: "删除",
    really: "确定永久删除？",
    close: "关闭",
  },
};

function texts() {
  const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  return locale.startsWith("zh") ? TEXTS.zh : TEXTS.en;
}

const STYLE = `
.instantcharacter-gallery { width: min(900px, 90vw); height: min(680px, 85vh); padding: 0; border-radius: 8px;
  border: 1px solid var(--border-color); background: var(--comfy-menu-bg); color: var(--input-text);
  margin: auto; font: 14px sans-serif; }
.instantcharacter-gallery[open] { display: flex; flex-direction: column; }
.instantcharacter-gallery::backdrop { background: rgb(0 0 0 / 50%); }
.instantcharacter-gallery header { display: flex; gap: 12px; align-items: center; padding: 12px 16px;
  border-bottom: 1px solid var(--border-color); }
.instantcharacter-gallery header b { flex: 1; }
.instantcharacter-gallery main { flex: 1; overflow: auto; padding: 12px 16px; }
.instantcharacter-gallery h3 { margin: 12px 0 8px; font-size: 13px; color: var(--descrip-text); }
.instantcharacter-gallery section > div { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
.instantcharacter-gallery input, .instantcharacter-gallery button { font: inherit; color: inherit; cursor: pointer;
  background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 6px; padding: 4px 8px; }
.instantcharacter-gallery input { cursor: text; }
.instantcharacter-gallery article { display: flex; flex-direction: column; gap: 4px; }
.instantcharacter-gallery .choose { display: flex; flex-direction: column; padding: 0; overflow: hidden; }
.instantcharacter-gallery .choose:is(:hover, :focus-visible), .instantcharacter-gallery .chosen .choose {
  outline: 2px solid var(--p-primary-color, #64b5f6); }
.instantcharacter-gallery img { width: 100%; aspect-ratio: 1; object-fit: cover; background: var(--comfy-input-bg); }
.instantcharacter-gallery .choose span { padding: 4px 8px; overflow-wrap: anywhere; }
.instantcharacter-gallery footer { display: flex; justify-content: space-between; align-items: center; font-size: 12px;
  color: var(--descrip-text); }
.instantcharacter-gallery .sure { color: var(--error-text); }
.instantcharacter-gallery [role="alert"] { color: var(--error-text); padding: 8px 16px; }
.instantcharacter-gallery [role="alert"]:empty { display: none; }
`;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

async function answer(path, options) {
  const response = await api.fetchApi(path, options);
  const content = await response.json();
  if (!response.ok) throw new Error(content.error ?? response.statusText);
  return content;
}

const query = (name) => `?name=${encodeURIComponent(name)}`;
const folderOf = (name) => name.split(/[\\/]/).slice(0, -1).join("/");
const titleOf = (name) => name.split(/[\\/]/).pop().replace(/\.safetensors$/, "");

/** Put a character's file into a node's widget, as a user who chooses it there. */
async function choose(node, name) {
  const widget = node.widgets.find((one) => one.name === "name");
  const values = widget.options?.values;
  if (Array.isArray(values) && !values.includes(name)) await app.refreshComboInNodes(); // saved since the page was loaded
  widget.value = NODES[node.comfyClass](name);
  widget.callback?.(widget.value, app.canvas, node);
  node.setDirtyCanvas(true, true);
}

function card(character, gallery) {
  const { name, adapter, has_thumbnail } = character;
  const words = texts();
  const remove = element("button", { type: "button", className: "delete", textContent: words.delete });
  const disarm = () => Object.assign(remove, { textContent: words.delete, className: "delete" });
  remove.onblur = remove.onmouseleave = disarm;
  remove.onclick = async () => {
    if (remove.className === "delete") {
      Object.assign(remove, { textContent: words.really, className: "delete sure" });
      return;
    }
    await gallery.attempt(async () => {
      await answer(ROUTE + query(name), { method: "DELETE" });
      await app.refreshComboInNodes();
      await gallery.load();
    });
  };
  const picture = element("img", { alt: "" });
  if (has_thumbnail) picture.src = api.apiURL(`${ROUTE}/thumbnail${query(name)}`);
  const pick = element("button", { type: "button", className: "choose", title: name }, picture, element("span", { textContent: titleOf(name) }));
  pick.onclick = () => gallery.choose(name);
  const made = element("span", { textContent: `${words.adapter} ${adapter.slice(0, 8)}`, title: adapter });
  return element("article", {}, pick, element("footer", {}, made, remove));
}

/** The dialog of one node. */
function openGallery(node) {
  const words = texts();
  const alert = element("div", { role: "alert" });
  const main = element("main");
  const filter = element("input", { type: "search", placeholder: words.filter });
  const close = element("button", { type: "button", textContent: words.close });
  const header = element("header", {}, element("b", { textContent: words.title }), filter, close);
  const dialog = element("dialog", { className: "instantcharacter-gallery" }, element("style", { textContent: STYLE }), header, alert, main);
  let characters = [];

  const gallery = {
    async attempt(work) {
      alert.textContent = "";
      try {
        await work();
      } catch (error) {
        alert.textContent = error.message;
      }
    },
    async load() {
      characters = await answer(ROUTE);
      gallery.show();
    },
    choose: (name) =>
      gallery.attempt(async () => {
        await choose(node, name);
        dialog.close();
      }),
    show() {
      const current = node.widgets.find((one) => one.name === "name").value;
      const shown = characters.filter(({ name }) => name.toLowerCase().includes(filter.value.toLowerCase()));
      const folders = [...new Set(shown.map(({ name }) => folderOf(name)))].sort();
      main.replaceChildren(
        ...folders.map((folder) => {
          const cards = shown.filter(({ name }) => folderOf(name) === folder).map((one) => {
            const made = card(one, gallery);
            made.classList.toggle("chosen", NODES[node.comfyClass](one.name) === current);
            return made;
          });
          return element("section", {}, ...(folder ? [element("h3", { textContent: folder })] : []), element("div", {}, ...cards));
        }),
      );
      if (!characters.length) main.textContent = words.none;
      if (!dialog.contains(document.activeElement)) filter.focus(); // of a deleted card, it went to the page
    },
  };

  filter.oninput = gallery.show;
  close.onclick = () => dialog.close();
  dialog.onclose = () => dialog.remove();
  dialog.onclick = (event) => event.target === dialog && dialog.close();
  dialog.onkeydown = (event) => event.stopPropagation(); // the page's shortcuts are keys, too
  document.body.append(dialog);
  dialog.showModal();
  gallery.attempt(gallery.load);
}

app.registerExtension({
  name: "InstantCharacter.Gallery",
  nodeCreated(node) {
    if (!(node.comfyClass in NODES)) return;
    const button = node.addWidget("button", texts().gallery, null, () => openGallery(node), { serialize: false });
    button.serialize = false; // workflow files stay as they are
  },
});
