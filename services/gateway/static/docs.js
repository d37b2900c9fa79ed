// Renders the merged OpenAPI document: operations by service, parameters, bodies and answers.

const METHODS = ["get", "post", "put", "patch", "delete", "head", "options"];

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

/** What `schema` is, in a line. */
function typeOf(schema) {
  if (!schema || Object.keys(schema).length === 0) return "anything";
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  const several = schema.anyOf ?? schema.oneOf;
  if (several) return several.map(typeOf).join(" | ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `[${typeOf(schema.items)}]`;
  if (schema.type === "object") return schema.additionalProperties ? `{…: ${typeOf(schema.additionalProperties)}}` : "object";
  const limits = [
    ["minLength", "≥", " characters"], ["maxLength", "≤", " characters"], ["minimum", "≥", ""], ["maximum", "≤", ""],
  ].filter(([key]) => key in schema).map(([key, sign, unit]) => `${sign} ${schema[key]}${unit}`);
  return [schema.format ? `${schema.type} (${schema.format})` : schema.type, ...limits].join(", ");
}

/** `schema` as lines of JSON-like text; names it has shown already are not unfolded again. */
function shape(schema, schemas, depth = 0, shown = []) {
  const indent = "  ".repeat(depth);
  if (schema?.$ref) {
    const name = schema.$ref.split("/").at(-1);
    return shown.includes(name) ? name : shape(schemas[name], schemas, depth, [...shown, name]);
  }
  if (schema?.type === "array") return `[${shape(schema.items, schemas, depth, shown)}]`;
  const several = schema?.anyOf ?? schema?.oneOf;
  if (several) return several.map((one) => shape(one, schemas, depth, shown)).join(" | ");
  if (!schema?.properties) return typeOf(schema);
  const required = new Set(schema.required ?? []);
  const lines = Object.entries(schema.properties).map(
    ([name, property]) => `${indent}  ${name}${required.has(name) ? "" : "?"}: ${shape(property, schemas, depth + 1, shown)}`,
  );
  return lines.length ? `{\n${lines.join("\n")}\n${indent}}` : "{}";
}

function content(title, described, schemas) {
  const parts = [element("h3", {}, title)];
  if (described.description && !described.content) parts.push(element("p", { className: "hint" }, described.description));
  for (const [type, media] of Object.entries(described.content ?? {})) {
    parts.push(element("code", {}, type));
    if (media.schema) parts.push(element("pre", {}, shape(media.schema, schemas)));
    else parts.push(document.createTextNode(" "));
  }
  return parts;
}

function parametersTable(parameters) {
  const row = (p) =>
    element("tr", {}, element("td", {}, element("code", {}, p.name), p.required ? " *" : ""), element("td", {}, p.in), element("td", {}, typeOf(p.schema)));
  const head = element("tr", {}, ...["Name", "In", "Type"].map((text) => element("th", { scope: "col" }, text)));
  return [element("h3", {}, "Parameters"), element("table", {}, element("thead", {}, head), element("tbody", {}, ...parameters.map(row)))];
}

function operationDetails(method, path, operation, schemas) {
  const body = element("div");
  if (operation.description) body.append(element("p", {}, operation.description));
  if (operation.parameters?.length) body.append(...parametersTable(operation.parameters));
  if (operation.requestBody) body.append(...content("Body", operation.requestBody, schemas));
  for (const [status, response] of Object.entries(operation.responses ?? {})) {
    body.append(...content(status === "default" ? "Errors" : `Answer ${status}`, response, schemas));
  }
  const secured = operation.security?.length ? (operation.security.some((s) => !Object.keys(s).length) ? "token optional" : "token") : "public";
  const details = element(
    "details",
    {},
    element("summary", {}, element("span", { className: `verb ${method}` }, method.toUpperCase()), element("code", {}, path), element("span", {}, operation.summary ?? ""), element("span", { className: "lock" }, secured)),
    body,
  );
  details.dataset.text = `${method} ${path} ${operation.summary ?? ""}`.toLowerCase();
  return details;
}

function render(openapi) {
  const schemas = openapi.components?.schemas ?? {};
  const groups = new Map((openapi.tags ?? []).map((tag) => [tag.name, []]));
  for (const [path, item] of Object.entries(openapi.paths)) {
    for (const method of METHODS.filter((name) => name in item)) {
      const group = item[method].tags?.[0] ?? "other";
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(operationDetails(method, path, item[method], schemas));
    }
  }
  const sections = [...groups].filter(([, operations]) => operations.length);
  document.getElementById("operations").replaceChildren(
    ...sections.map(([name, operations]) => element("section", {}, element("h2", {}, name), ...operations)),
  );
  const count = sections.reduce((sum, [, operations]) => sum + operations.length, 0);
  document.getElementById("state").textContent = `${count} operations`;
}

document.getElementById("filter").addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase();
  for (const section of document.querySelectorAll("#operations section")) {
    let any = false;
    for (const details of section.querySelectorAll("details")) {
      details.hidden = !details.dataset.text.includes(wanted);
      any ||= !details.hidden;
    }
    section.hidden = !any;
  }
});

try {
  const response = await fetch("/api/openapi.json");
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  render(await response.json());
} catch (error) {
  document.getElementById("state").textContent = `The document cannot be had: ${error.message}`;
}
