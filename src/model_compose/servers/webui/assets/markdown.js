// A model's Markdown as safe elements: no scripts, styles, pictures or forms. HTML in it is shown as it was written.
import DOMPurify from "./vendor/dompurify/purify.es.mjs";
import { Marked } from "./vendor/marked/marked.esm.js";

const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;" };
const marked = new Marked({ breaks: true });
marked.use({ renderer: { html: ({ text }) => text.replace(/[&<>]/g, (character) => ESCAPES[character]) } });

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") Object.assign(node, { target: "_blank", rel: "noopener noreferrer" });
});

const SAFE = {
  ALLOWED_TAGS: (
    "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre strong table tbody td th thead tr ul"
  ).split(" "),
  ALLOWED_ATTR: ["href", "start", "align"],
  RETURN_DOM_FRAGMENT: true,
};

export const markdown = (text) => DOMPurify.sanitize(marked.parse(text), SAFE);
