import { getModel, streamChat } from './api.js';
import { defaults, messages, save, settings } from './store.js';
import { fit, hideTip, messageElement, replyElement } from './view.js';

const $ = id => document.getElementById(id);
const [list, input, scroll] = [$('messages'), $('input'), $('scroll')];
const examples = ['Tell me a short story.', 'What is a llama?', 'Write a poem about small things.'];

let model = null;
// The reply that comes, by what aborts it.
let running = null;
let follows = true;
let frame = 0;

// The conversation: { role, content, tokens?, rate?, seconds?, finish? }.

/** Shows the messages from one on; those before it stay as they are, an open editor too. */
function show(from = list.children.length) {
  hideTip();
  while (list.children.length > from) {
    list.lastElementChild.remove();
  }
  list.append(...messages.slice(from).map((message, i) => messageElement(message, {
    edit: text => edit(from + i, text),
    regenerate: () => regenerate(from + i),
    retry: () => regenerate(from + i + 1),
  })));
  list.hidden = messages.length === 0;
  $('empty').hidden = messages.length > 0;
  save();
}

function conversation() {
  const system = settings.system.trim();
  return [...(system ? [{ role: 'system', content: system }] : []), ...messages.map(({ role, content }) => ({ role, content }))];
}

function request() {
  const given = ['temperature', 'top_p', 'min_p', 'repetition_penalty', 'top_k', 'max_tokens', 'seed'].filter(key => settings[key] !== null);
  return {
    messages: conversation(),
    ...Object.fromEntries(given.map(key => [key, settings[key]])),
    logprobs: true,
    top_logprobs: 5,
  };
}

async function reply() {
  fail(null);
  const message = { role: 'assistant', content: '', tokens: [] };
  const asked = request();
  const at = messages.push(message) - 1;
  show();
  const view = replyElement(message, list.lastElementChild);
  const controller = new AbortController();
  running = controller;
  setBusy(true);
  follows = true;
  const start = performance.now();
  let [first, count] = [null, 0];
  let pending = [];
  try {
    for await (const chunk of streamChat(asked, settings.key, controller.signal)) {
      if (chunk.usage) {
        count = chunk.usage.completion_tokens;
        showContext(chunk.usage.total_tokens);
      }
      const choice = chunk.choices[0];
      if (!choice) {
        continue;
      }
      message.finish = choice.finish_reason ?? message.finish;
      const text = choice.delta?.content ?? '';
      pending.push(...(choice.logprobs?.content ?? []).map(compact));
      if (text) {
        first ??= performance.now();
        count++;
        const token = { text, likely: pending };
        pending = [];
        message.content += text;
        message.tokens.push(token);
        message.rate = count > 1 ? (count - 1) / ((performance.now() - first) / 1000) : undefined;
        view.append(token);
        keepAtEnd();
      }
    }
  } catch (error) {
    if (error.name === 'AbortError') {
      message.finish = 'stopped';
    } else {
      fail(error.code === 'context_length_exceeded' && error.param !== 'max_tokens' ? `The conversation is too long for this model: ${error.message}. Start a new chat, or edit an earlier message.` : error.message);
    }
  }
  if (running !== controller) {
    return;
  }
  if (first !== null) {
    message.seconds = (first - start) / 1000;
    message.rate = count > 1 ? (count - 1) / ((performance.now() - first) / 1000) : undefined;
    message.count = count;
  }
  if (message.content === '' && message.finish !== 'stop') {
    messages.pop();
  }
  running = null;
  setBusy(false);
  show(at);
  keepAtEnd();
}

function compact(info) {
  const pair = ({ token, logprob }) => [token, Math.exp(logprob)];
  return { chosen: pair(info), top: info.top_logprobs.map(pair) };
}

function send(text) {
  if (running || !text.trim()) {
    return;
  }
  messages.push({ role: 'user', content: text.trim() });
  reply();
}

function edit(index, text) {
  cut(index);
  send(text);
}

function regenerate(index) {
  cut(index);
  reply();
}

/** Stops the reply that comes; what came of it stays. */
function stop() {
  running?.abort();
}

/** Leaves the first messages; a reply that comes ends unseen. */
function cut(length) {
  stop();
  running = null;
  setBusy(false);
  messages.length = length;
  show(length);
}

function setBusy(busy) {
  $('send').hidden = busy;
  $('stop').hidden = !busy;
  document.body.classList.toggle('busy', busy);
}

function fail(text) {
  $('error').hidden = !text;
  $('error').textContent = text ?? '';
}

function showContext(tokens) {
  $('context').textContent = model ? `${tokens} of ${model.meta.n_ctx} tokens` : '';
}

/** Once a frame: to ask for the height lays the whole conversation out. */
function keepAtEnd() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(() => {
    if (follows) {
      scroll.scrollTop = scroll.scrollHeight;
    }
  });
}

function fitInput() {
  fit(input);
  $('send').disabled = !input.value.trim();
}

async function connect() {
  try {
    model = await getModel(settings.key);
    $('model').textContent = model.id;
    document.title = model.id;
    $('facts').textContent = `${number(model.meta.n_params)} parameters · context ${model.meta.n_ctx}`;
    fail(null);
  } catch (error) {
    fail(error.status === 401 ? 'This server needs an API key: enter it in the settings.' : `The server cannot be reached: ${error.message}`);
  }
}

function number(n) {
  return Intl.NumberFormat('en', { notation: 'compact', maximumFractionDigits: 1 }).format(n);
}

function applyTheme() {
  document.documentElement.dataset.theme = settings.theme ?? '';
}

function applyColours() {
  document.body.classList.toggle('colours', settings.colours);
  $('colours').setAttribute('aria-pressed', settings.colours);
}

function fillSettings() {
  for (const field of $('settings').querySelectorAll('[name]')) {
    field.value = settings[field.name] ?? '';
    const output = field.parentElement.querySelector('output');
    if (output) {
      output.textContent = Number(field.value).toFixed(2);
    }
  }
}

$('composer').addEventListener('submit', event => {
  event.preventDefault();
  if (!running) {
    const text = input.value;
    input.value = '';
    fitInput();
    send(text);
  }
});
input.addEventListener('input', fitInput);
input.addEventListener('keydown', event => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $('composer').requestSubmit();
  } else if (event.key === 'ArrowUp' && input.value === '' && !running) {
    event.preventDefault();
    [...list.querySelectorAll('.user .edit')].at(-1)?.click();
  }
});
document.addEventListener('keydown', event => {
  if (event.key === 'Escape' && !$('settings').open) {
    stop();
  } else if (event.key.toUpperCase() === 'O' && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $('new').click();
  }
});
document.addEventListener('click', hideTip);
scroll.addEventListener('scroll', () => {
  hideTip();
  follows = scroll.scrollTop + scroll.clientHeight > scroll.scrollHeight - 40;
});
$('stop').addEventListener('click', stop);
$('new').addEventListener('click', () => {
  cut(0);
  $('context').textContent = '';
  fail(null);
  input.focus();
});
$('theme').addEventListener('click', () => {
  const dark = settings.theme ? settings.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  settings.theme = dark ? 'light' : 'dark';
  applyTheme();
  save();
});
$('colours').addEventListener('click', () => {
  settings.colours = !settings.colours;
  applyColours();
  save();
});
$('open-settings').addEventListener('click', () => {
  fillSettings();
  $('settings').showModal();
});
$('settings').addEventListener('input', event => {
  const { name, value, type } = event.target;
  settings[name] = ['range', 'number'].includes(type) ? (value === '' ? null : Number(value)) : value;
  const output = event.target.parentElement.querySelector('output');
  if (output) {
    output.textContent = Number(value).toFixed(2);
  }
  save();
});
$('settings').addEventListener('close', () => {
  connect();
  input.focus();
});
$('reset').addEventListener('click', () => {
  const { key, theme, colours } = settings;
  Object.assign(settings, defaults, { key, theme, colours });
  fillSettings();
  save();
});
$('examples').replaceChildren(...examples.map(text => {
  const button = document.createElement('button');
  button.className = 'example';
  button.textContent = text;
  button.addEventListener('click', () => send(text));
  return button;
}));

applyTheme();
applyColours();
fitInput();
show();
keepAtEnd();
connect();
