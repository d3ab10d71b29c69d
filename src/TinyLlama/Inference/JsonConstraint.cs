using TinyLlama.Data;

namespace TinyLlama.Inference;

/// <summary>
/// What a text must be: JSON, or JSON of a schema. While it is generated, only tokens are chosen with which it still can
/// become that, so what ends by itself is valid; what <see cref="GenerationOptions.MaxTokens"/> cuts off is the beginning
/// of something valid.
/// </summary>
/// <remarks>
/// Of what a schema allows, this is written: properties in the order of the schema and none that it does not name,
/// integers of up to 18 digits, and between tokens nothing, a space, or a line feed with up to 20 spaces. Keep a
/// constraint that is used again: what was computed for it serves the next text.
/// </remarks>
public sealed class JsonConstraint
{
    internal JsonConstraint(JsonGrammar grammar, int value)
    {
        (Grammar, Root) = (grammar, grammar.AddRule());
        int start = grammar.Start(Root);
        grammar.Link(grammar.Call(start, value), grammar.End(Root));
        grammar.Link(grammar.Call(grammar.Bytes(start, " "u8), value), grammar.End(Root));
    }

    /// <summary>Gets the constraint to any JSON object.</summary>
    public static JsonConstraint AnyObject { get; } = CreateAnyObject();

    internal JsonGrammar Grammar { get; }

    internal int Root { get; }

    /// <summary>The constraint to a JSON schema.</summary>
    /// <param name="schema">
    /// A schema of type, properties, required, additionalProperties (true or false), enum, const, items, minItems, maxItems,
    /// anyOf, minLength, maxLength and $ref to # or into $defs; titles, descriptions and other annotations are ignored.
    /// </param>
    /// <exception cref="UserErrorException">It is no JSON, or it says something else; the message names the key.</exception>
    public static JsonConstraint FromSchema(string schema) => JsonSchemaCompiler.Compile(schema);

    private static JsonConstraint CreateAnyObject()
    {
        var grammar = new JsonGrammar();
        return new JsonConstraint(grammar, grammar.AnyObject);
    }
}
