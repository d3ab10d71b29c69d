/** How messages look. Text is always set as text, never as HTML. */

const turn = 'M15.500 8A6 6 0 1 0 16 10M16 4v4h-4';
const icons = {
  copy: 'M7 7V4h9v9h-3M4 7h9v9H4z',
  edit: 'M4 16l1-4 8-8 3 3-8 8z',
  again: turn,
  retry: turn,
};

// A pointer that only passes over a text asks for nothing.
const restMilliseconds = 120;

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

function action(name, title, click) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', '0 0 20 20');
  svg.setAttribute('aria-hidden', 'true');
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  path.setAttribute('d', icons[name]);
  svg.append(path);
  const button = element('button', `quiet icon ${name}`, svg);
  button.title = title;
  button.setAttribute('aria-label', title);
  button.addEventListener('click', click);
  return button;
}

/** A message with what can be done to it. */
export function messageElement(message, { edit, regenerate, retry }) {
  const isUser = message.role === 'user';
  const body = element('div', 'body');
  const actions = element('div', 'actions', action('copy', 'Copy', () => navigator.clipboard.writeText(message.content)));
  const made = element('article', `message ${message.role}`, body, actions);
  made.setAttribute('aria-label', isUser ? 'You' : 'Assistant');
  if (isUser) {
    body.textContent = message.content;
    actions.prepend(action('edit', 'Edit', () => editor(made, message.content, edit)));
    actions.append(action('retry', 'Ask again', retry));
  } else {
    body.append(...(message.tokens ?? []).map(tokenElement));
    actions.append(action('again', 'Regenerate', regenerate));
    actions.append(element('span', 'measure', measure(message)));
  }
  return made;
}

/** The last message while its reply comes: tokens are appended to it. */
export function replyElement(message, article) {
  const body = article.querySelector('.body');
  const line = article.querySelector('.measure');
  article.classList.add('coming');
  return {
    append(token) {
      body.append(tokenElement(token));
      line.textContent = measure(message);
    },
  };
}

function measure({ rate, seconds, count, finish }) {
  return [
    rate !== undefined && `${rate.toFixed(1)} tokens/s`,
    count !== undefined && `${count} tokens`,
    seconds !== undefined && `first after ${seconds.toFixed(2)} s`,
    finish === 'length' && 'cut off by the limit',
    finish === 'stopped' && 'stopped',
  ].filter(Boolean).join(' · ');
}

function tokenElement(token) {
  const span = element('span', 'token', token.text);
  if (token.likely.length > 0) {
    const probability = token.likely.reduce((product, { chosen }) => product * chosen[1], 1);
    span.classList.add(`p${Math.min(4, Math.floor(probability * 5))}`);
    span.addEventListener('pointerenter', () => {
      waiting = setTimeout(() => showTip(span, token.likely), restMilliseconds);
    });
    span.addEventListener('pointerleave', hideTip);

    // A finger leaves where it taps.
    span.addEventListener('click', event => {
      event.stopPropagation();
      showTip(span, token.likely);
    });
  }
  return span;
}

let waiting;

function showTip(span, likely) {
  const tip = document.getElementById('tip');
  tip.replaceChildren(...likely.flatMap(({ chosen, top }) => {
    const rows = top.some(([text]) => text === chosen[0]) ? top : [chosen, ...top];
    return rows.map(row => tipRow(row, row[0] === chosen[0]));
  }));
  tip.hidden = false;
  const [at, size] = [span.getClientRects()[0], tip.getBoundingClientRect()];
  const left = Math.max(8, Math.min(at.left, innerWidth - size.width - 8));
  const top = at.top > size.height + 8 ? at.top - size.height - 6 : at.bottom + 6;
  tip.style.transform = `translate(${left}px, ${top}px)`;
}

/** To be called also where tokens are taken away: an element that is gone sees no pointer leave. */
export function hideTip() {
  clearTimeout(waiting);
  document.getElementById('tip').hidden = true;
}

function tipRow([text, probability], isChosen) {
  const fill = element('i', '');
  fill.style.width = `${probability * 100}%`;
  const shown = text.replaceAll('\n', '↵').replaceAll(' ', '␣') || '·';
  return element('div', isChosen ? 'row chosen' : 'row', element('code', '', shown), element('div', 'bar', fill), element('span', '', `${(probability * 100).toFixed(1)} %`));
}

/** Makes a text area as high as its text. */
export function fit(area) {
  area.style.height = 'auto';
  area.style.height = `${area.scrollHeight}px`;
}

function editor(article, text, save) {
  const area = element('textarea', 'editor');
  area.value = text;
  area.rows = 1;
  area.setAttribute('aria-label', 'Edit message');
  const before = [...article.children];
  const cancel = () => article.replaceChildren(...before);
  const done = () => (area.value.trim() ? save(area.value) : cancel());
  const button = (name, className, click) => {
    const made = element('button', className, name);
    made.addEventListener('click', click);
    return made;
  };
  area.addEventListener('keydown', event => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      done();
    } else if (event.key === 'Escape') {
      event.stopPropagation();
      cancel();
    }
  });
  article.replaceChildren(area, element('div', 'end', button('Cancel', 'quiet', cancel), button('Send', 'primary', done)));
  area.addEventListener('input', () => fit(area));
  fit(area);
  area.focus();
}
