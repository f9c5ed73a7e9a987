// A request as text to copy: curl, and Python with OpenAI's SDK. Pure. The key itself is never written out.

const WIDTH = 100;
const INDENT = { curl: 2, python: 4 };
const KEY_VARIABLE = "RECONTROL_API_KEY";
// OpenAI's SDK knows every field but this one.
const EXTRA = "control";

export function curl({ path, body }, { baseUrl, hasKey }) {
  const lines = [
    `curl -N ${quoted(`${baseUrl}/${path}`)}`,
    ...(hasKey ? [`-H "authorization: Bearer $${KEY_VARIABLE}"`] : []),
    "-H 'content-type: application/json'",
    `-d ${quoted(literal(body, "curl", 0))}`,
  ];
  return lines.join(" \\\n  ");
}

export function python({ path, body }, { baseUrl, hasKey }) {
  const isChat = path === "chat/completions";
  const { [EXTRA]: extra, ...known } = body;
  const fields = { ...known, ...(extra ? { extra_body: { [EXTRA]: extra } } : {}) };
  const pad = " ".repeat(INDENT.python);
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(baseUrl)}, api_key=${hasKey ? `os.environ["${KEY_VARIABLE}"]` : '"none"'})`,
    `stream = client.${isChat ? "chat.completions" : "completions"}.create(`,
    ...Object.entries(fields).map(([name, value]) => `${pad}${name}=${literal(value, "python", INDENT.python)},`),
    ")",
    "for event in stream:",
    `${pad}print(${isChat ? 'event.choices[0].delta.content or ""' : "event.choices[0].text"}, end="", flush=True)`,
  ].join("\n");
}

/** For a shell: nothing in it is expanded, whatever an address holds. */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** JSON, or Python's way to write it: on one line where it fits, else an entry a line. */
function literal(value, language, depth) {
  if (value === null || typeof value !== "object") return scalar(value, language);
  const isList = Array.isArray(value);
  const [open, close] = isList ? "[]" : "{}";
  const entries = (inner) =>
    isList
      ? value.map((item) => literal(item, language, inner))
      : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, language, inner)}`);
  const line = open + entries(depth).join(", ") + close;
  if (depth > 0 && depth + line.length <= WIDTH && !line.includes("\n")) return line;
  const inner = depth + INDENT[language];
  const comma = language === "python" ? "," : "";
  return `${open}\n${entries(inner).map((entry) => " ".repeat(inner) + entry).join(",\n")}${comma}\n${" ".repeat(depth)}${close}`;
}

function scalar(value, language) {
  if (language === "python" && typeof value === "boolean") return value ? "True" : "False";
  if (language === "python" && value === null) return "None";
  // JSON's escapes are Python's too.
  return JSON.stringify(value);
}
