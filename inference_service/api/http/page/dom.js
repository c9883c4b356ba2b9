const TAIL = 10; // characters at the end of a name that are always shown

/** Makes an element with properties and children; text is only ever text. */
export function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A name that is cut in its middle where it finds no room: names often differ in their ends. */
export function middle(name, className) {
  const tail = element("span", { className: "tail" }, name.slice(-TAIL));
  const head = element("span", { className: "head" }, name.slice(0, -TAIL));
  return element("span", { className: `middle ${className}`, title: name }, head, tail);
}
