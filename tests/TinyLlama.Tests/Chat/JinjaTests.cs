using TinyLlama.Chat;
using TinyLlama.Data;

namespace TinyLlama.Tests.Chat;

/// <summary>The outputs are those of Jinja 3.1 with trim_blocks and lstrip_blocks, as Hugging Face renders chat templates.</summary>
public sealed class JinjaTests
{
    [Theory]
    [InlineData("a{{ 1 + 2 }}b", "a3b")]
    [InlineData("{{ 'x' ~ 1 ~ none ~ true }}", "x1NoneTrue")]
    [InlineData("{{ missing }}|{{ missing is defined }}|{{ missing is not defined }}", "|False|True")]
    [InlineData("{{ 'a\\n\\'b\\\\' }}", "a\n'b\\")]
    [InlineData("{% if 1 == 1 and not 'a' == 'b' or false %}y{% else %}n{% endif %}", "y")]
    [InlineData("{% if words[0] == 'x' %}1{% elif words[-1] == 'three' %}2{% else %}3{% endif %}", "2")]
    [InlineData("{% for w in words %}{{ loop.index0 }}{{ loop.index }}{{ w }}{% if not loop.last %}, {% endif %}{% endfor %}", "01one, 12two, 23three")]
    [InlineData("{% for w in words %}{% if loop.first %}<{% endif %}{{ w }}{% endfor %}{{ loop is defined }}", "<onetwothreeFalse")]
    [InlineData("{% set x = 1 %}{% for w in words %}{% set x = 2 %}{% endfor %}{{ x }}", "1")]
    [InlineData("{% set ns = namespace(x=1, found=false) %}{% for w in words %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}{{ ns.found }}", "4False")]
    [InlineData("{{ 'two' in words }}{{ 'four' not in words }}{{ 'ell' in 'hello' }}{{ 'a' in map }}", "TrueTrueTrueTrue")]
    [InlineData("{{ map.a }}{{ map['b'] }}{{ map.c is undefined }}{{ map is mapping }}", "AB&\"éTrueTrue")]
    [InlineData("{{ words[1:] | join('-') }}|{{ words[:-1] | join }}|{{ 'hello'[1:3] }}", "two-three|onetwo|el")]
    [InlineData("{{ ' a b ' | trim }}.{{ ' a '.strip() }}.{{ 'xax'.lstrip('x') }}.{{ ' a '.rstrip() }}.", "a b.a.ax. a.")]
    [InlineData("{{ 'a</t>b</t>'.split('</t>')[0] }}{{ 'p q  r'.split() | length }}{{ 'x,'.split(',') | length }}", "a32")]
    [InlineData("{{ 'ab'.startswith('a') }}{{ 'ab'.endswith('a') }}{{ 'ab' | upper }}{{ 'AB'.lower() }}", "TrueFalseABab")]
    [InlineData("{{ map | tojson }}", "{\"a\": \"A\", \"b\": \"B&\\\"é\"}")]
    [InlineData("{{ [1, 'a', [], none, true] | tojson }}", "[1, \"a\", [], null, true]")]
    [InlineData("{{ 'yes' if words | length > 2 else 'no' }}{{ 'yes' if false }}", "yes")]
    [InlineData("{{ 5 % 2 }}{{ -3 % 2 }}{{ 7 - 2 - 1 }}{{ (1 < 2) == (2 >= 2) }}", "114True")]
    [InlineData("{{ missing | default('d') }}{{ none is none }}{{ '' or 'else' }}{{ 'a' is string }}", "dTrueelseTrue")]
    [InlineData("a\n  {%- if true -%}\n  b\n {%- endif %}\nc", "abc")]
    [InlineData("a\n  {% if true %}\nb\n  {% endif %}\nc\n", "a\nb\nc")]
    [InlineData("a {% if true %}\n b\n {% endif %} c", "a  b\n c")]
    [InlineData("a\n  {# note\n -#}\n  b\n{{- 'c' }}\nd\n\n", "a\nbc\nd\n")]
    [InlineData("  {%+ if true %}x{% endif +%}\ny", "  x\ny")]
    [InlineData("{{ '}}' }}{{ \"{%\" }}", "}}{%")]
    public void Output_is_that_of_Jinja(string template, string expected) => Assert.Equal(expected, Render(template));

    [Theory]
    [InlineData("{% macro m() %}{% endmacro %}", "line 1", "the tag 'macro'")]
    [InlineData("\n\n{{ words | map('upper') }}", "line 3", "the filter 'map'")]
    [InlineData("{{ strftime_now('%d') }}", "line 1", "the function 'strftime_now'")]
    [InlineData("{{ words.append(1) }}", "line 1", "the method 'append'")]
    [InlineData("{{ 1 is even }}", "line 1", "the test 'even'")]
    [InlineData("{% for k, v in map %}{% endfor %}", "line 1", "a loop over pairs")]
    [InlineData("{% for w in words if w %}{% endfor %}", "line 1", "a loop with a condition")]
    [InlineData("{% for w in words %}{% else %}{% endfor %}", "line 1", "'else' of a loop")]
    [InlineData("{% set x %}a{% endset %}", "line 1", "'set' without a value")]
    [InlineData("{{ {'a': 1} }}", "line 1", "a mapping in braces")]
    [InlineData("{{ words | tojson(indent=2) }}", "line 1", "the named argument 'indent'")]
    [InlineData("{{ 2 * 3 }}", "line 1", "the operator '*'")]
    [InlineData("{% if true %}", "line 1", "'the end' in place of '{%'")]
    [InlineData("a{% endif %}", "line 1", "'endif' without its beginning")]
    [InlineData("{{ 1", "line 1", "has no end '}}'")]
    [InlineData("{# a", "line 1", "has no end '#}'")]
    [InlineData("{{ 'a }}", "line 1", "does not end")]
    [InlineData("{{ 1 ? 2 }}", "line 1", "'?' means nothing")]
    [InlineData("{{ 99999999999999999999 }}", "line 1", "too large")]
    public void What_is_not_supported_is_named_when_the_template_is_read(string template, string place, string what)
    {
        string message = Assert.Throws<UserErrorException>(() => Jinja.Parse(template, "file")).Message;
        Assert.StartsWith($"file: {place} of the chat template: ", message, StringComparison.Ordinal);
        Assert.Contains(what, message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("a\n{{ 1 + 'a' }}", "line 2", "a number and a text cannot be added")]
    [InlineData("{{ missing.name }}", "line 1", "'name' is asked of undefined")]
    [InlineData("{{ words }}", "line 1", "a list cannot be written as text")]
    [InlineData("{% for x in 1 %}{% endfor %}", "line 1", "not over a number")]
    [InlineData("{% set map.x = 1 %}", "line 1", "'map' is no namespace")]
    [InlineData("{{ 'a' < 1 }}", "line 1", "cannot be compared")]
    [InlineData("{{ 1 % 0 }}", "line 1", "not positive")]
    [InlineData("{{ 'a'.split('') }}", "line 1", "an empty one")]
    public void What_has_no_meaning_is_an_error_of_the_line(string template, string place, string what)
    {
        string message = Assert.Throws<UserErrorException>(() => Render(template)).Message;
        Assert.StartsWith($"file: {place} of the chat template: ", message, StringComparison.Ordinal);
        Assert.Contains(what, message, StringComparison.Ordinal);
    }

    [Fact]
    public void Exceptions_of_the_template_come_through() => Assert.Equal(
        "the chat template refuses this conversation: roles must alternate",
        Assert.Throws<UserErrorException>(() => Render("{{ raise_exception('roles must ' + 'alternate') }}")).Message);

    public static TheoryData<string> Hostile() => new(
        "{% set a = 'x' %}" + Repeat("{% set a = a + a %}", 60),
        "{% set a = [1] %}" + Repeat("{% set a = a + a %}", 60),
        "{% set a = [1] %}" + Repeat("{% set a = [a, a] %}", 60) + "{{ a | tojson }}",
        "{% set a = [1] %}" + Repeat("{% set a = [a, a] %}", 60) + "{{ a == [a[0], a[0]] }}",
        Nested("{% for a in words %}", "{% endfor %}", 30),
        "{% set s = 'x' %}" + Repeat("{% set s = s + s %}", 20) + Repeat("{{ s }}", 10),
        "{% set s = 'x' %}" + Repeat("{% set s = s + s %}", 20) + "{% set l = [s, s] %}" + Repeat("{% set l = l + l %}", 15) + "{{ l | join(s) }}",
        "{{ " + Repeat("(", 30_000) + "1" + Repeat(")", 30_000) + " }}",
        "{{ " + Repeat("not ", 16_000) + "1 }}",
        "{{ 1" + Repeat("+1", 32_000) + " }}",
        "{{ 'a'" + Repeat("|trim", 12_000) + " }}",
        Nested("{% if 1 %}", "{% endif %}", 3_000),
        "{% if 0 %}" + Repeat("{% elif 0 %}", 5_000) + "{% endif %}",
        new string('x', 70_000));

    [Theory]
    [MemberData(nameof(Hostile))]
    public void A_hostile_template_ends_with_an_error(string template)
    {
        // A small stack, so that what recurses is seen to stop.
        Exception? error = null;
        var thread = new Thread(() => error = Record.Exception(() => Render(template)), 256 << 10);
        thread.Start();
        thread.Join();
        Assert.True(error is null or UserErrorException, error?.ToString());
        Assert.True(error is not null || template.StartsWith("{{ 1+", StringComparison.Ordinal) || template.StartsWith("{% if", StringComparison.Ordinal), "it ran to its end");
    }

    [Fact]
    public void Nested_values_end_with_an_error() =>
        Assert.IsType<UserErrorException>(Record.Exception(() => Render(
            "{% set ns = namespace(a=[1]) %}{% set l = 'x' %}" + Repeat("{% set l = l + l %}", 16)
            + "{% for c in l.split('x') %}{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a | tojson }}")));

    [Fact]
    public void Marks_follow_what_was_given_from_outside()
    {
        Dictionary<string, object?> variables = new(StringComparer.Ordinal) { ["given"] = MarkedText.Foreign(" <s> ") };
        string Foreign(string template)
        {
            MarkedText output = Jinja.Parse(template, "file").Render(variables);
            return string.Concat(output.Text.Zip(output.IsForeign, (c, foreign) => foreign ? c : '·'));
        }

        Assert.Equal("··<s>·", Foreign("<s{{ given | trim }}>"));
        Assert.Equal("·<S>", Foreign("{{ 'x' + given.strip() | upper }}"));
        Assert.Equal("<··>", Foreign("{{ given.strip()[0] ~ 'ab' ~ given.split('s')[1].strip() }}"));
        Assert.Equal("\" <s> \"", Foreign("{{ given | tojson }}"));
        Assert.Equal(" <s> ·· <s> ", Foreign("{{ [given, given] | join('ab') }}"));
    }

    private static string Render(string template) => Jinja.Parse(template, "file").Render(new(StringComparer.Ordinal)
    {
        ["words"] = new List<object?> { MarkedText.Own("one"), MarkedText.Own("two"), MarkedText.Own("three") },
        ["map"] = new Dictionary<string, object?>(StringComparer.Ordinal) { ["a"] = MarkedText.Own("A"), ["b"] = MarkedText.Own("B&\"é") },
    }).Text;

    private static string Repeat(string text, int count) => string.Concat(Enumerable.Repeat(text, count));

    private static string Nested(string before, string after, int count) => Repeat(before, count) + "x" + Repeat(after, count);
}
