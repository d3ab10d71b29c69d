using TinyLlama.Training;

namespace TinyLlama.Cli;

/// <summary>What the process ends with.</summary>
internal static class ExitCode
{
    /// <summary>Done.</summary>
    public const int Success = 0;

    /// <summary>The command ran, and its result is a no: a verification failed, a comparison differs.</summary>
    public const int Failure = 1;

    /// <summary>The user can mend it: a wrong option, a wrong file, too little memory.</summary>
    public const int UserError = 2;

    /// <summary>A rank lost the others, or they lost it: one died or hangs. The same command goes on from the newest checkpoint.</summary>
    public const int RanksLost = RankWatch.ExitCode;

    /// <summary>A defect of this program (EX_SOFTWARE of sysexits.h).</summary>
    public const int Defect = 70;

    /// <summary>Stopped by Ctrl-C before the end (128 + SIGINT).</summary>
    public const int Stopped = 130;
}
