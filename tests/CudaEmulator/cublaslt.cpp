// libcublasLt as far as the product calls it; plain loops with sums in fp32. What cuBLASLt refuses is refused: shapes that do
// not fit together, leading dimensions, types, alignment, too small a workspace, an algorithm for another product. So is
// what it would not notice: a result that overlaps an operand. Each refusal is a line on stderr and cuBLASLt's status.
#include "driver.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

namespace {

enum Status { Success = 0, InvalidValue = 7, ExecutionFailed = 13, NotSupported = 15 };
enum Type { Real32F = 0, Real16BF = 14 };
enum Operation { AsIs = 0, Transposed = 1 };
enum Attribute { TransposeA = 3, TransposeB = 4, MaxWorkspace = 1, AlignmentA = 5, AlignmentD = 8 };

constexpr int Compute32F = 68;

// Each begins with a number of its own, by which it is known.
struct Descriptor {
    static constexpr uint32_t Mark = 0xd35c;
    uint32_t mark = Mark;
    int operations[2] = {AsIs, AsIs};
};

struct Layout {
    static constexpr uint32_t Mark = 0x1a40;
    uint32_t mark = Mark;
    int type;
    uint64_t rows, columns;
    int64_t leading;

    size_t element_bytes() const { return type == Real16BF ? 2 : 4; }
    size_t bytes() const { return ((columns - 1) * leading + rows) * element_bytes(); }
};

struct Preference {
    static constexpr uint32_t Mark = 0x93ef;
    uint32_t mark = Mark;
    uint32_t alignments[4] = {256, 256, 256, 256};
    uint64_t workspace = 0;
};

// cublasLtMatmulAlgo_t. It knows what product it was proposed for.
struct Algorithm {
    static constexpr uint32_t Mark = 0xa190;
    uint32_t mark, alignment;
    uint64_t workspace;
    int64_t m, n, k, leading_a, leading_b, leading_d;
};
static_assert(sizeof(Algorithm) == 64);

// cublasLtMatmulHeuristicResult_t.
struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
static_assert(sizeof(Heuristic) == 96);

int handle;  // the only one; known by its address

template<class T> bool is(const T* object) { return object && object->mark == T::Mark; }

template<class T> Status destroy(T* object) {
    if (!is(object)) {
        return InvalidValue;
    }

    object->mark = 0;
    delete object;
    return Success;
}

__attribute__((format(printf, 2, 3))) Status refuse(Status status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("cublasLt: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return status;
}

// m, n and k of D = op(A) · op(B), if the layouts fit together.
Status fit(Algorithm& product, const Descriptor* operation, const Layout* a, const Layout* b, const Layout* c, const Layout* d) {
    if (!is(operation) || !is(a) || !is(b) || !is(c) || !is(d)) {
        return refuse(InvalidValue, "a descriptor or layout that there is not");
    }

    if (a->type != Real16BF || b->type != Real16BF || c->type != d->type) {
        return refuse(NotSupported, "types %d, %d, %d and %d", a->type, b->type, c->type, d->type);
    }

    const bool transpose_a = operation->operations[0] == Transposed, transpose_b = operation->operations[1] == Transposed;
    product.m = transpose_a ? a->columns : a->rows;
    product.k = transpose_a ? a->rows : a->columns;
    product.n = transpose_b ? b->rows : b->columns;
    const int64_t k = transpose_b ? b->columns : b->rows;
    for (const Layout* result : {c, d}) {
        if (product.k != k || (int64_t)result->rows != product.m || (int64_t)result->columns != product.n || product.m * product.n * k == 0) {
            return refuse(
                InvalidValue, "a result of %ld x %ld from %ld x %ld and %ld x %ld", (long)result->rows, (long)result->columns,
                (long)product.m, (long)product.k, (long)k, (long)product.n);
        }
    }

    product.leading_a = a->leading;
    product.leading_b = b->leading;
    product.leading_d = d->leading;
    return c->leading == d->leading ? Success : refuse(NotSupported, "C and D with two leading dimensions");
}

// Whether two matrices share memory: columns of one pitch may lie between each other, as ranges of a tensor do.
bool overlap(const void* p, const Layout& of_p, const void* q, const Layout& of_q) {
    const uintptr_t a = (uintptr_t)p, b = (uintptr_t)q;
    const size_t pitch = of_p.leading * of_p.element_bytes();
    const size_t distance = b >= a ? (b - a) % pitch : pitch - 1 - (a - b - 1) % pitch;
    const bool same_pitch = pitch == of_q.leading * of_q.element_bytes();
    const bool between = distance >= of_p.rows * of_p.element_bytes() && distance + of_q.rows * of_q.element_bytes() <= pitch;
    return a < b + of_q.bytes() && b < a + of_p.bytes() && !(same_pitch && between);
}

// Element (row, column) of op(X), whose row or column is consecutive in memory.
struct Operand {
    const uint16_t* elements;
    int64_t row_step, column_step;

    Operand(const uint16_t* elements, int64_t leading, int operation)
        : elements(elements), row_step(operation == Transposed ? leading : 1), column_step(operation == Transposed ? 1 : leading) {}

    float at(int64_t row, int64_t column) const { return emulator::bf16_value(elements[row * row_step + column * column_step]); }
};

// D (m, n) = op(A) · op(B) + β D. A function like a kernel, so that traces know it.
void product(
    void* d, const uint16_t* a, const uint16_t* b, int64_t m, int64_t n, int64_t k, int64_t leading_a, int64_t leading_b, int64_t leading_d,
    int operation_a, int operation_b, int type, float beta) {
    const Operand left(a, leading_a, operation_a), right(b, leading_b, operation_b);
    std::vector<float> rows(m * k);
    for (int64_t p = 0; p < k; p++) {
        for (int64_t i = 0; i < m; i++) {
            rows[p * m + i] = left.at(i, p);
        }
    }

    std::vector<float> sums(m);
    for (int64_t j = 0; j < n; j++) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t p = 0; p < k; p++) {
            const float factor = right.at(p, j);
            for (int64_t i = 0; i < m; i++) {
                sums[i] += rows[p * m + i] * factor;
            }
        }

        // Where β is 0, what D holds is not read: it may be anything.
        for (int64_t i = 0; i < m; i++) {
            if (type == Real16BF) {
                uint16_t& to = ((uint16_t*)d)[j * leading_d + i];
                to = emulator::bf16_bits(beta == 0 ? sums[i] : sums[i] + beta * emulator::bf16_value(to));
            } else {
                float& to = ((float*)d)[j * leading_d + i];
                to = beta == 0 ? sums[i] : sums[i] + beta * to;
            }
        }
    }
}

const emulator::Source source("cublasLt", "", 0, {emulator::function<product>("cublas_lt_product", 0)});

}  // namespace

extern "C" {

size_t cublasLtGetVersion() { return 130000; }

const char* cublasLtGetStatusName(int status) {
    switch (status) {
        case Success: return "CUBLAS_STATUS_SUCCESS";
        case InvalidValue: return "CUBLAS_STATUS_INVALID_VALUE";
        case ExecutionFailed: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case NotSupported: return "CUBLAS_STATUS_NOT_SUPPORTED";
        default: return "CUBLAS_STATUS_UNKNOWN";
    }
}

int cublasLtCreate(void** created) {
    *created = &handle;
    return Success;
}

int cublasLtDestroy(void* destroyed) { return destroyed == &handle ? Success : InvalidValue; }

int cublasLtMatmulDescCreate(Descriptor** descriptor, int compute_type, int scale_type) {
    *descriptor = new Descriptor();
    return compute_type == Compute32F && scale_type == Real32F ? Success : refuse(NotSupported, "compute type %d", compute_type);
}

int cublasLtMatmulDescSetAttribute(Descriptor* descriptor, int attribute, const int* operation, size_t bytes) {
    if (!is(descriptor) || (attribute != TransposeA && attribute != TransposeB) || bytes != sizeof *operation
        || (*operation != AsIs && *operation != Transposed)) {
        return refuse(InvalidValue, "attribute %d of %zu bytes of a descriptor", attribute, bytes);
    }

    descriptor->operations[attribute - TransposeA] = *operation;
    return Success;
}

int cublasLtMatmulDescDestroy(Descriptor* descriptor) { return destroy(descriptor); }

int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *layout = new Layout{Layout::Mark, type, rows, columns, leading};
    return (type == Real32F || type == Real16BF) && leading >= (int64_t)rows
        ? Success
        : refuse(InvalidValue, "a matrix of type %d with %ld rows and leading dimension %ld", type, (long)rows, (long)leading);
}

int cublasLtMatrixLayoutDestroy(Layout* layout) { return destroy(layout); }

int cublasLtMatmulPreferenceCreate(Preference** preference) {
    *preference = new Preference();
    return Success;
}

int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
    if (is(preference) && attribute == MaxWorkspace && bytes == sizeof preference->workspace) {
        memcpy(&preference->workspace, value, bytes);
    } else if (is(preference) && attribute >= AlignmentA && attribute <= AlignmentD && bytes == sizeof preference->alignments[0]) {
        memcpy(&preference->alignments[attribute - AlignmentA], value, bytes);
    } else {
        return refuse(InvalidValue, "attribute %d of %zu bytes of a preference", attribute, bytes);
    }

    return Success;
}

int cublasLtMatmulPreferenceDestroy(Preference* preference) { return destroy(preference); }

// One algorithm. Where the sums are long and the result is small it wants a workspace, as one that splits the sums.
int cublasLtMatmulAlgoGetHeuristic(
    void* lt, const Descriptor* operation, const Layout* a, const Layout* b, const Layout* c, const Layout* d,
    const Preference* preference, int requested, Heuristic* results, int* returned) {
    if (lt != &handle || !is(preference) || requested < 1) {
        return refuse(InvalidValue, "no handle, no preference, or no room for an algorithm");
    }

    Algorithm algorithm{};
    *returned = 0;
    if (const Status status = fit(algorithm, operation, a, b, c, d)) {
        return status;
    }

    const uint64_t split = 2 * sizeof(float) * algorithm.m * algorithm.n;
    algorithm.mark = Algorithm::Mark;
    algorithm.workspace = algorithm.k > 4 * std::max(algorithm.m, algorithm.n) && split <= preference->workspace ? split : 0;
    algorithm.alignment = *std::min_element(preference->alignments, preference->alignments + 4);
    *results = {algorithm, algorithm.workspace, Success, 1.0f, {}};
    *returned = 1;
    return Success;
}

int cublasLtMatmul(
    void* lt, const Descriptor* operation, const float* alpha, const uint16_t* a, const Layout* layout_a, const uint16_t* b,
    const Layout* layout_b, const float* beta, const void* c, const Layout* layout_c, void* d, const Layout* layout_d,
    const Algorithm* algorithm, void* workspace, size_t workspace_bytes, driver::Stream* stream) {
    Algorithm wanted = algorithm ? *algorithm : Algorithm{};
    if (lt != &handle || !is(algorithm) || !stream || *alpha != 1 || c != d) {
        return refuse(InvalidValue, "no handle, algorithm or stream, alpha %f, or C elsewhere than D", *alpha);
    }

    if (const Status status = fit(wanted, operation, layout_a, layout_b, layout_c, layout_d)) {
        return status;
    }

    if (memcmp(&wanted, algorithm, sizeof wanted) != 0) {
        return refuse(NotSupported, "an algorithm of another product than %ld x %ld x %ld", (long)wanted.m, (long)wanted.n, (long)wanted.k);
    }

    for (const void* address : {(const void*)a, (const void*)b, (const void*)d}) {
        if (!address || (uintptr_t)address % algorithm->alignment != 0) {
            return refuse(NotSupported, "address %p, which is no multiple of %u", address, algorithm->alignment);
        }
    }

    if (workspace_bytes < algorithm->workspace || (uintptr_t)workspace % 16 != 0) {
        return refuse(InvalidValue, "a workspace of %zu bytes at %p where %lu are needed", workspace_bytes, workspace, (long)algorithm->workspace);
    }

    if (overlap(d, *layout_d, a, *layout_a) || overlap(d, *layout_d, b, *layout_b)) {
        return refuse(InvalidValue, "a result that overlaps an operand");
    }

    const uint64_t room = (uint64_t)workspace, room_bytes = algorithm->workspace;
    if (room_bytes > 0 && driver::queue(stream, [=] { return driver::fill(room, 0xff, room_bytes); }) != driver::Success) {
        return refuse(ExecutionFailed, "a workspace that is not the device's");
    }

    int operation_a = operation->operations[0], operation_b = operation->operations[1], type = layout_d->type;
    float factor = *beta;
    void* arguments[] = {&d, &a, &b, &wanted.m, &wanted.n, &wanted.k, &wanted.leading_a, &wanted.leading_b, &wanted.leading_d,
                         &operation_a, &operation_b, &type, &factor, nullptr};
    return driver::queue_launch(stream, source.functions[0], {}, 0, 0, arguments) == driver::Success ? Success : ExecutionFailed;
}

}  // extern "C"
