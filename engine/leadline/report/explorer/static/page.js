// What all parts of the page share: asking the server, and making elements. What the run says becomes text, never HTML.

export const $ = (id) => document.getElementById(id);

export function element(name, about = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(about)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

export const options = (pairs) => pairs.map(([value, text]) => element("option", { value }, text));

export const count = (n, of) => `${n.toLocaleString("en")} ${of}${n === 1 ? "" : "s"}`;

export const figure = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));

// The last question of each kind is the one that is answered: an earlier one that is still open is given up.
const open = new Map();

export async function ask(address, kind, sent = {}) {
  open.get(kind)?.abort();
  const control = new AbortController();
  open.set(kind, control);
  const answer = await fetch(address, { ...sent, signal: control.signal });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

// What went wrong, said on the page; nothing of what was given up.
export function say(error) {
  if (error?.name === "AbortError") return;
  $("said").textContent = error ? error.message : "";
  $("said").hidden = !error;
}

export function picture(data, point, size, alt) {
  const image = element("img", {
    className: "picture", src: `images/${data}/${size}/${point}.png`, alt, loading: size === "small" ? "lazy" : "eager",
  });
  image.addEventListener("error", () => {
    image.replaceWith(element("span", { className: "picture none soft" }, "no image"));
  });
  return image;
}
