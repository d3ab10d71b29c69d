using System.Text.RegularExpressions;
using Microsoft.Playwright;
using TinyLlama.Tests.Common;
using static Microsoft.Playwright.Assertions;

namespace TinyLlama.Server.Tests;

/// <summary>The chat page in a real Chromium.</summary>
public sealed class ChatPageTests : IAsyncLifetime
{
    private const string Chromium = "/usr/bin/chromium";
    private const string Reply = ".assistant .body";

    private readonly List<string> _problems = [];
    private IPlaywright? _playwright;
    private IBrowser? _browser;
    private RunningServer? _server;
    private IPage _page = null!;

    public async ValueTask InitializeAsync()
    {
        Assert.SkipUnless(File.Exists(Chromium), $"needs {Chromium}");
        _server = await RunningServer.StartAsync(options => options.ContextLength = 65_536);
        _playwright = await Playwright.CreateAsync();
        Assertions.SetDefaultExpectTimeout(60_000);
        _browser = await _playwright.Chromium.LaunchAsync(new BrowserTypeLaunchOptions
        {
            ExecutablePath = Chromium,
            Args =
            [
                "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync",
            ],
        });
        _page = await _browser.NewPageAsync(new BrowserNewPageOptions { ViewportSize = new ViewportSize { Width = 1200, Height = 800 } });
        _page.PageError += (_, error) => _problems.Add(error);
        _page.Console += (_, message) => Note(message.Type == "error", message.Text);

        // Offline: whatever is asked of another host is a problem.
        _page.Request += (_, request) => Note(!request.Url.StartsWith(_server.Address.AbsoluteUri, StringComparison.Ordinal), request.Url);
        await _page.GotoAsync(_server.Address.AbsoluteUri);
        await Expect(_page.Locator("#facts")).ToContainTextAsync("context 65536");
        await SetAsync("max_tokens", "24");
    }

    public async ValueTask DisposeAsync()
    {
        await (_browser?.CloseAsync() ?? Task.CompletedTask);
        _playwright?.Dispose();
        await (_server?.DisposeAsync() ?? ValueTask.CompletedTask);
        GC.SuppressFinalize(this);
    }

    [Fact]
    public async Task A_message_is_answered_and_its_cost_told()
    {
        await Expect(_page.Locator("#empty")).ToBeVisibleAsync();
        await SendAsync("hello");
        await Expect(_page.Locator(".user .body")).ToHaveTextAsync("hello");
        await Expect(_page.Locator(".assistant .measure")).ToContainTextAsync(Pattern(@"[\d.]+ tokens/s · 24 tokens · first after [\d.]+ s · cut off"));
        await Expect(_page.Locator("#context")).ToContainTextAsync(Pattern(@"\d+ of 65536 tokens"));
        await Expect(_page.Locator("#empty")).ToBeHiddenAsync();
        Assert.Empty(_problems);
    }

    [Fact]
    public async Task What_a_message_holds_is_text()
    {
        await SendAsync("<img src=x onerror=alert(1)>\n\"second\" line");
        await Expect(_page.Locator(".user .body")).ToHaveTextAsync("<img src=x onerror=alert(1)>\n\"second\" line");
        Assert.Equal(0, await _page.Locator(".user .body img").CountAsync());
        Assert.Empty(_problems);
    }

    [Fact]
    public async Task Escape_stops_a_reply_and_frees_its_place()
    {
        await SetAsync("max_tokens", "60000");
        await SendAsync("hello", waits: false);
        await Expect(_page.Locator(".coming .token").Nth(20)).ToBeAttachedAsync();
        await Expect(_page.Locator("#stop")).ToBeVisibleAsync();
        await _page.Keyboard.PressAsync("Escape");
        await Expect(_page.Locator(".assistant .measure")).ToContainTextAsync("stopped");
        await Expect(_page.Locator("#send")).ToBeVisibleAsync();
        await _server!.UntilIdleAsync();
        Assert.InRange(_server.Model.Generator.NewTokens, 20, 59_000);
        Assert.Empty(_problems);
    }

    [Fact]
    public async Task A_reply_is_regenerated_and_a_message_edited()
    {
        await SetAsync("temperature", "1.5");
        await SendAsync("one");
        string first = await _page.Locator(Reply).InnerTextAsync();
        await _page.Locator(".again").ClickAsync();
        await Expect(_page.Locator(Reply)).Not.ToHaveTextAsync(first);
        await IdleAsync();
        await SendAsync("two");
        Assert.Equal(4, await _page.Locator(".message").CountAsync());

        // Of the first message: what came after it goes.
        await _page.Locator(".user").First.HoverAsync();
        await _page.Locator(".edit").First.ClickAsync();
        await _page.Locator(".editor").FillAsync("changed");
        await _page.Keyboard.PressAsync("Enter");
        await IdleAsync();
        await Expect(_page.Locator(".user .body")).ToHaveTextAsync("changed");
        Assert.Equal(2, await _page.Locator(".message").CountAsync());

        // The key for it edits the last one; Escape leaves it as it was.
        await _page.Locator("#input").PressAsync("ArrowUp");
        await Expect(_page.Locator(".editor")).ToHaveValueAsync("changed");
        await _page.Keyboard.PressAsync("Escape");
        await Expect(_page.Locator(".user .body")).ToHaveTextAsync("changed");
        Assert.Empty(_problems);
    }

    [Fact]
    public async Task Settings_are_what_the_server_is_asked_by_and_stay()
    {
        await SetAsync("system", "Be brief.");
        await SetAsync("seed", "5");
        IRequest request = await _page.RunAndWaitForRequestAsync(() => SendAsync("hi"), request => request.Method == "POST");
        Assert.Contains("\"messages\":[{\"role\":\"system\",\"content\":\"Be brief.\"},{\"role\":\"user\",\"content\":\"hi\"}]", request.PostData!, StringComparison.Ordinal);
        Assert.Contains("\"max_tokens\":24,\"seed\":5", request.PostData!, StringComparison.Ordinal);
        string reply = await _page.Locator(Reply).InnerTextAsync();
        await _page.ReloadAsync();
        await Expect(_page.Locator(Reply)).ToHaveTextAsync(reply);
        await _page.Locator(".again").ClickAsync();
        await IdleAsync();
        await Expect(_page.Locator(Reply)).ToHaveTextAsync(reply);
        await _page.Keyboard.PressAsync("Control+Shift+O");
        Assert.Equal(0, await _page.Locator(".message").CountAsync());
        Assert.Empty(_problems);
    }

    [Fact]
    public async Task Probabilities_show_under_the_pointer()
    {
        await SendAsync("hello");
        await _page.Locator(".token").Nth(3).HoverAsync();
        await Expect(_page.Locator("#tip")).ToBeVisibleAsync();
        await Expect(_page.Locator("#tip .chosen").First).ToContainTextAsync(Pattern(@"\d+\.\d %"));
        Assert.True(await _page.Locator("#tip .row").CountAsync() >= 5);
        await _page.Locator("#input").HoverAsync();
        await Expect(_page.Locator("#tip")).ToBeHiddenAsync();

        // A tap enters and leaves at once.
        await _page.Locator(".token").Nth(3).DispatchEventAsync("pointerenter");
        await _page.Locator(".token").Nth(3).DispatchEventAsync("pointerleave");
        await _page.Locator(".token").Nth(3).DispatchEventAsync("click");
        await Expect(_page.Locator("#tip")).ToBeVisibleAsync();
        await _page.Locator("#model").ClickAsync();
        await Expect(_page.Locator("#tip")).ToBeHiddenAsync();
        Task<string[]> Colours() => _page.Locator(".token").EvaluateAllAsync<string[]>("all => all.map(token => getComputedStyle(token).backgroundColor)");
        string[] plain = await Colours();
        Assert.Single(plain.Distinct());
        await _page.Locator("#colours").ClickAsync();
        Assert.NotEqual(plain, await Colours());
        Assert.Empty(_problems);
    }

    [Fact]
    public async Task A_message_is_edited_while_a_later_reply_comes()
    {
        await SendAsync("one");
        await SetAsync("max_tokens", "60000");
        await _page.Locator(".user").First.HoverAsync();
        await _page.Locator(".edit").First.ClickAsync();
        await _page.Locator(".editor").FillAsync("changed");
        await SendAsync("two", waits: false);
        await Expect(_page.Locator(".coming .token").Nth(5)).ToBeAttachedAsync();
        await Expect(_page.Locator(".editor")).ToHaveValueAsync("changed");
        await _page.Locator(".editor").PressAsync("Enter");
        await Expect(_page.Locator(".user .body")).ToHaveTextAsync("changed");
        await Expect(_page.Locator(".coming .token").Nth(5)).ToBeAttachedAsync();
        await Expect(_page.Locator(".message")).ToHaveCountAsync(2);
        await _page.Keyboard.PressAsync("Escape");
        await Expect(_page.Locator(".assistant .measure")).ToContainTextAsync("stopped");
        await _server!.UntilIdleAsync();
        Assert.Empty(_problems);
    }

    [Fact]
    public async Task Probabilities_of_a_token_that_goes_do_not_show()
    {
        await _page.Clock.InstallAsync();
        await SendAsync("hello");
        await _page.EvaluateAsync("""
            () => {
              document.querySelector('.token').dispatchEvent(new PointerEvent('pointerenter'));
              document.querySelector('#new').click();
            }
            """);
        await _page.Clock.RunForAsync(1000);
        await Expect(_page.Locator("#tip")).ToBeHiddenAsync();
        Assert.Empty(_problems);
    }

    [Fact]
    public async Task A_refused_request_is_told_in_words()
    {
        await SetAsync("max_tokens", "999999");
        await SendAsync("hello");
        await Expect(_page.Locator("#error")).ToContainTextAsync("more than the context of 65536; ask for");
        await Expect(_page.Locator(".assistant")).ToHaveCountAsync(0);
        await SetAsync("max_tokens", "3");
        await _page.Locator(".retry").ClickAsync();
        await Expect(_page.Locator("#error")).ToBeHiddenAsync();
        await Expect(_page.Locator(Reply)).ToHaveCountAsync(1);
        await Expect(_page.Locator(".retry")).ToBeHiddenAsync();
        await IdleAsync();
        await SendAsync("again");
        await Expect(_page.Locator("#error")).ToBeHiddenAsync();
        await Expect(_page.Locator(Reply)).ToHaveCountAsync(2);
    }

    [Theory]
    [InlineData(360, 640)]
    [InlineData(1200, 800)]
    public async Task Nothing_is_wider_than_the_window(int width, int height)
    {
        await _page.SetViewportSizeAsync(width, height);
        await SendAsync(new string('w', 300) + " and more");
        Assert.True(await _page.EvaluateAsync<bool>("document.documentElement.scrollWidth <= innerWidth"));
        await _page.Locator("#open-settings").ClickAsync();
        Assert.True(await _page.EvaluateAsync<bool>("document.querySelector('dialog').getBoundingClientRect().right <= innerWidth"));
        await _page.Locator("#theme").EvaluateAsync("button => button.click()");
        string background = await _page.EvaluateAsync<string>("getComputedStyle(document.body).backgroundColor");
        await _page.Locator("#theme").EvaluateAsync("button => button.click()");
        Assert.NotEqual(background, await _page.EvaluateAsync<string>("getComputedStyle(document.body).backgroundColor"));
        Assert.Empty(_problems);
    }

    private static Regex Pattern(string pattern) => new(pattern, RegexOptions.None, TimeSpan.FromSeconds(1));

    private void Note(bool isProblem, string text)
    {
        if (isProblem)
        {
            _problems.Add(text);
        }
    }

    /// <summary>Makes docs/pictures/chat.png: <c>-explicit only -method "*The_picture_of_the_readme"</c>.</summary>
    [Fact(Explicit = true)]
    public async Task The_picture_of_the_readme()
    {
        await using RunningServer server = await RunningServer.StartAsync(options =>
            (options.Model, options.ChatTemplate) = (SharedFiles.Require("oracles/stories260K/stories260K.bin"), "plain"));
        await _page.SetViewportSizeAsync(1100, 680);
        await _page.GotoAsync(server.Address.AbsoluteUri);
        await SendAsync("Once upon a time, there was a little girl who");
        await _page.Locator("#colours").ClickAsync();
        await _page.Locator("#input").FillAsync("One day, Tom went to the park with his friend");
        await _page.Locator(".token").Nth(80).HoverAsync();
        await Expect(_page.Locator("#tip")).ToBeVisibleAsync();
        await _page.ScreenshotAsync(new PageScreenshotOptions { Path = Path.Combine(SharedFiles.Checkout()!, "docs/pictures/chat.png") });
    }

    private async Task SendAsync(string text, bool waits = true)
    {
        await _page.Locator("#input").FillAsync(text);
        await _page.Keyboard.PressAsync("Enter");
        if (waits)
        {
            await IdleAsync();
        }
    }

    private Task IdleAsync() => Expect(_page.Locator("body")).Not.ToHaveClassAsync(Pattern("busy"));

    private async Task SetAsync(string name, string value)
    {
        await _page.Locator("#open-settings").ClickAsync();
        await _page.Locator($"[name={name}]").FillAsync(value);
        await _page.Locator("dialog .end .primary").ClickAsync();
    }
}
