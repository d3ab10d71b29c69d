/** What stays when the page is closed: settings and the conversation, in this browser alone. */

export const defaults = {
  system: '',
  temperature: 0.7,
  top_p: 0.95,
  min_p: 0,
  repetition_penalty: 1,
  top_k: 50,
  max_tokens: null,
  seed: null,
  key: '',
  colours: false,
  theme: null,
};

function read(name, absent) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? absent;
  } catch {
    return absent;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // A full or forbidden store costs the memory of this page, nothing else.
  }
}

export const settings = { ...defaults, ...read('tinyllama.settings', {}) };
export const messages = read('tinyllama.messages', []);

export function save() {
  write('tinyllama.settings', settings);
  write('tinyllama.messages', messages);
}
