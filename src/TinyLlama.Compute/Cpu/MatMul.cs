namespace TinyLlama.Compute.Cpu;

/// <summary>
/// The matrix products of a linear layer: output = input · weightᵀ and its two backward products. Placeholder for the
/// tiled kernels: runs the definition.
/// </summary>
internal static unsafe class MatMul
{
    /// <summary>The definition. Slow, obvious, and what every other version is tested against; sums in double precision.</summary>
    internal static class Scalar
    {
        /// <summary>output (N, O) = or += input (N, I) · weightᵀ, weight (O, I).</summary>
        public static void Forward(Tensor output, Tensor input, Tensor weight, bool accumulate)
        {
            for (int n = 0; n < output.Rows; n++)
            {
                for (int o = 0; o < output.Columns; o++)
                {
                    double sum = accumulate ? *At(output, n, o) : 0;
                    for (int i = 0; i < input.Columns; i++)
                    {
                        sum += (double)*At(input, n, i) * *At(weight, o, i);
                    }

                    *At(output, n, o) = (float)sum;
                }
            }
        }

        /// <summary>dInput (N, I) = or += dOutput (N, O) · weight, weight (O, I).</summary>
        public static void BackwardInput(Tensor dInput, Tensor dOutput, Tensor weight, bool accumulate)
        {
            for (int n = 0; n < dInput.Rows; n++)
            {
                for (int i = 0; i < dInput.Columns; i++)
                {
                    double sum = accumulate ? *At(dInput, n, i) : 0;
                    for (int o = 0; o < dOutput.Columns; o++)
                    {
                        sum += (double)*At(dOutput, n, o) * *At(weight, o, i);
                    }

                    *At(dInput, n, i) = (float)sum;
                }
            }
        }

        /// <summary>dWeight (O, I) += dOutputᵀ · input, dOutput (N, O), input (N, I).</summary>
        public static void BackwardWeight(Tensor dWeight, Tensor dOutput, Tensor input)
        {
            for (int o = 0; o < dWeight.Rows; o++)
            {
                for (int i = 0; i < dWeight.Columns; i++)
                {
                    double sum = *At(dWeight, o, i);
                    for (int n = 0; n < dOutput.Rows; n++)
                    {
                        sum += (double)*At(dOutput, n, o) * *At(input, n, i);
                    }

                    *At(dWeight, o, i) = (float)sum;
                }
            }
        }

        private static float* At(Tensor tensor, int row, int column) =>
            (float*)tensor.Address + ((nint)row * tensor.Stride) + column;
    }
}
