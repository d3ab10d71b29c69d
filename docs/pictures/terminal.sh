#!/usr/bin/env bash
# Draws what a command printed as a terminal, in SVG: terminal.sh "COMMAND" < output.txt > picture.svg
set -euo pipefail
awk -v command="$1" '
  function escape(text) { gsub(/&/, "\\&amp;", text); gsub(/</, "\\&lt;", text); gsub(/>/, "\\&gt;", text); return text }
  BEGIN { lines[++count] = "$ " command }
  { while (length($0) > 118) { lines[++count] = substr($0, 1, 118); $0 = "     " substr($0, 119) } lines[++count] = $0 }
  END {
    height = count * 18 + 56
    printf "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"960\" height=\"%d\" font-family=\"ui-monospace, Menlo, Consolas, monospace\" font-size=\"13\">\n", height
    printf "<rect width=\"960\" height=\"%d\" rx=\"8\" fill=\"#16181d\"/>\n", height
    print "<circle cx=\"20\" cy=\"18\" r=\"6\" fill=\"#ff5f56\"/><circle cx=\"40\" cy=\"18\" r=\"6\" fill=\"#ffbd2e\"/><circle cx=\"60\" cy=\"18\" r=\"6\" fill=\"#27c93f\"/>"
    for (i = 1; i <= count; i++) {
      color = i == 1 ? "#7ee787" : (lines[i] ~ /^[0-9]\. / ? "#79c0ff" : (lines[i] ~ /this model/ ? "#f2cc60" : "#d6d9de"))
      printf "<text x=\"16\" y=\"%d\" fill=\"%s\" xml:space=\"preserve\">%s</text>\n", 34 + i * 18, color, escape(lines[i])
    }
    print "</svg>"
  }'
