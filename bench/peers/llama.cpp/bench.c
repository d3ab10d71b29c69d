/* Times llama.cpp and prints one JSON object; also writes files of other types than the one it is given.
 *
 *   bench load MODEL THREADS
 *   bench prefill MODEL THREADS REPEATS TOKENS
 *   bench decode MODEL THREADS REPEATS SEQUENCES DEPTH TOKENS
 *   bench quantize MODEL THREADS TYPE OUTPUT
 *
 * load opens the model and decodes one token; prefill decodes one prompt; decode continues SEQUENCES texts, each DEPTH
 * tokens long, by TOKENS tokens, a token of each in a step. What is timed is what llama.cpp's own llama-bench and
 * llama-batched-bench time: llama_decode of random tokens on one pool of threads, default settings (keys and values in
 * f16, flash attention where it can), logits of the last token of each text, no sampling.
 */
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static const char *path;
static struct llama_model *model;
static struct llama_context *context;
static int threads;

/* ggml_threadpool_new, which only the CPU library that was loaded has. */
typedef struct ggml_threadpool *new_pool(struct ggml_threadpool_params *);

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(2);
}

static void print_errors(enum ggml_log_level level, const char *text, void *data) {
    (void)data;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

/* ---- the machine ---- */

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Processor time of this process, in seconds. */
static double own_seconds(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

/* Processor time of everything that ran on this machine, and of what the host took from it, in seconds. */
static double machine_seconds(void) {
    unsigned long long user, nice, system, idle, wait, irq, softirq, steal;
    FILE *file = fopen("/proc/stat", "r");
    if (!file || fscanf(file, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &system, &idle, &wait, &irq,
                        &softirq, &steal) != 8) {
        fail("/proc/stat: not readable");
    }
    fclose(file);
    return (double)(user + nice + system + irq + softirq + steal) / (double)sysconf(_SC_CLK_TCK);
}

static long long peak_bytes(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return 1024LL * usage.ru_maxrss;
}

/* The variant of the CPU library that ggml chose for this processor, as in libggml-cpu-haswell.so. */
static const char *variant(void) {
    static char line[512];
    FILE *file = fopen("/proc/self/maps", "r");
    while (file && fgets(line, sizeof line, file)) {
        char *name = strstr(line, "libggml-cpu-");
        if (name) {
            name += strlen("libggml-cpu-");
            name[strcspn(name, ".")] = 0;
            fclose(file);
            return name;
        }
    }
    fail("no libggml-cpu-*.so in %s runs on this processor", LIBRARIES);
    return NULL;
}

/* ---- llama.cpp ---- */

static void load(void) {
    model = llama_model_load_from_file(path, llama_model_default_params());
    if (!model) {
        fail("%s: llama.cpp cannot load it", path);
    }
}

/* Room for so many texts of so many tokens each, everything else by default. */
static void open_context(int sequences, int tokens) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = (uint32_t)(sequences * tokens);
    params.n_seq_max = (uint32_t)sequences;
    params.n_threads = params.n_threads_batch = threads;
    context = llama_init_from_model(model, params);
    if (!context) {
        fail("llama.cpp cannot make a context of %d texts of %d tokens", sequences, tokens);
    }

    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    new_pool *pool = (new_pool *)ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_threadpool_new");
    struct ggml_threadpool_params pool_params = ggml_threadpool_params_default(threads);
    llama_attach_threadpool(context, pool(&pool_params), NULL);
}

/* Decodes tokens random tokens of each text, from the given position on, in one call. */
static void decode(int sequences, int position, int tokens) {
    int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    struct llama_batch batch = llama_batch_init(sequences * tokens, 0, 1);
    for (int sequence = 0; sequence < sequences; sequence++) {
        for (int i = 0; i < tokens; i++) {
            int row = batch.n_tokens++;
            batch.token[row] = rand() % vocabulary;
            batch.pos[row] = position + i;
            batch.n_seq_id[row] = 1;
            batch.seq_id[row][0] = sequence;
            batch.logits[row] = i == tokens - 1;
        }
    }

    if (llama_decode(context, batch) != 0) {
        fail("llama_decode failed");
    }

    llama_synchronize(context);
    llama_batch_free(batch);
}

/* Forgets all but the first tokens of each text. */
static void keep(int tokens) {
    if (!llama_memory_seq_rm(llama_get_memory(context), -1, tokens, -1)) {
        fail("llama_memory_seq_rm failed");
    }
}

/* ---- what is measured ---- */

static void begin_line(const char *test) {
    const char *name = strrchr(path, '/');
    printf("{\"model\": \"%s\", \"version\": \"%s\", \"variant\": \"%s\", \"threads\": %d, \"test\": \"%s\", ",
           name ? name + 1 : path, llama_version(), variant(), threads, test);
}

static int ascending(const void *left, const void *right) {
    double x = *(const double *)left, y = *(const double *)right;
    return (x > y) - (x < y);
}

/* Texts of depth tokens get tokens more, in steps of the given size, as often as repeats says after a warm-up. */
static void time_tokens(const char *test, int repeats, int sequences, int depth, int tokens, int step) {
    double times[repeats], best_step = 1e9;
    open_context(sequences, depth + tokens);
    if (depth > 0) {
        decode(sequences, 0, depth);
    }

    decode(sequences, depth, step);
    double machine = machine_seconds(), own = own_seconds(), begin = seconds();
    for (int repeat = 0; repeat < repeats; repeat++) {
        keep(depth);
        times[repeat] = 0;
        for (int i = 0; i < tokens; i += step) {
            double start = seconds();
            decode(sequences, depth + i, step);
            double time = seconds() - start;
            times[repeat] += time;
            best_step = time < best_step ? time : best_step;
        }
    }

    double wall = seconds() - begin;
    own = own_seconds() - own;
    machine = machine_seconds() - machine;
    qsort(times, (size_t)repeats, sizeof times[0], ascending);
    begin_line(test);
    printf("\"sequences\": %d, \"depth\": %d, \"tokens\": %d, \"best_tokens_per_second\": %.2f, "
           "\"median_tokens_per_second\": %.2f, \"best_step_tokens_per_second\": %.2f, \"others\": %.2f, "
           "\"peak_bytes\": %lld}\n",
           sequences, depth, tokens, sequences * tokens / times[0], sequences * tokens / times[repeats / 2],
           sequences * step / best_step, (machine - own) / wall, peak_bytes());
}

static void time_load(void) {
    double start = seconds();
    load();
    open_context(1, 512);
    double loaded = seconds();
    decode(1, 0, 1);
    double end = seconds();
    begin_line("load");
    printf("\"load_seconds\": %.4f, \"first_token_seconds\": %.4f, \"peak_bytes\": %lld}\n", loaded - start, end - loaded,
           peak_bytes());
}

static void quantize(const char *type, const char *output) {
    static const struct { const char *name; enum llama_ftype type; } types[] = {
        {"f16", LLAMA_FTYPE_MOSTLY_F16},   {"bf16", LLAMA_FTYPE_MOSTLY_BF16},     {"q8_0", LLAMA_FTYPE_MOSTLY_Q8_0},
        {"q4_0", LLAMA_FTYPE_MOSTLY_Q4_0}, {"q4_k_m", LLAMA_FTYPE_MOSTLY_Q4_K_M}, {"q6_k", LLAMA_FTYPE_MOSTLY_Q6_K},
    };
    struct llama_model_quantize_params params = llama_model_quantize_default_params();
    params.nthread = threads;
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        if (strcmp(type, types[i].name) == 0) {
            params.ftype = types[i].type;
            if (llama_model_quantize(path, output, &params) != 0) {
                fail("%s: llama.cpp cannot quantize it", path);
            }

            return;
        }
    }

    fail("%s: not a type; write f16, bf16, q8_0, q4_0, q4_k_m or q6_k", type);
}

int main(int count, char **arguments) {
    const char *test = count > 3 ? arguments[1] : "";
    int numbers[4] = {0};
    path = arguments[2];
    threads = count > 3 ? atoi(arguments[3]) : 0;
    for (int i = 4; i < count && i < 8; i++) {
        numbers[i - 4] = atoi(arguments[i]);
    }

    llama_log_set(print_errors, NULL);
    ggml_backend_load_all_from_path(LIBRARIES);
    llama_backend_init();
    if (strcmp(test, "load") == 0 && count == 4) {
        time_load();
    } else if (strcmp(test, "prefill") == 0 && count == 6) {
        load();
        time_tokens(test, numbers[0], 1, 0, numbers[1], numbers[1]);
    } else if (strcmp(test, "decode") == 0 && count == 8) {
        load();
        time_tokens(test, numbers[0], numbers[1], numbers[2], numbers[3], 1);
    } else if (strcmp(test, "quantize") == 0 && count == 6) {
        quantize(arguments[4], arguments[5]);
    } else {
        fail("usage: the head of bench.c");
    }

    return 0;
}
