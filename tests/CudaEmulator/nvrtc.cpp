// NVRTC as far as the product calls it: compiling is to find the source of that name, which the emulator was built with.
#include <string>

#include "emulator.h"

// Its program is the source of that name, if the text is the one that the emulator was built with.
struct Program {
    std::string name, text;
};

extern "C" {

// A version that no NVRTC has: what is kept on disk by version is never taken for a real one's.
int nvrtcVersion(int* major, int* minor) {
    *major = 0;
    *minor = 0;
    return 0;
}

int nvrtcGetNumSupportedArchs(int* count) {
    *count = 2;
    return 0;
}

int nvrtcGetSupportedArchs(int* architectures) {
    architectures[0] = 80;
    architectures[1] = 90;
    return 0;
}

int nvrtcCreateProgram(Program** program, const char* text, const char* name, int, const char**, const char**) {
    *program = new Program{name, text};
    return 0;
}

static const emulator::Source* source_of(const Program* program) {
    for (const emulator::Source* source : emulator::sources()) {
        if (source->name == program->name && std::string(source->text, source->length) == program->text) {
            return source;
        }
    }

    return nullptr;
}

int nvrtcCompileProgram(Program* program, int, const char**) { return source_of(program) ? 0 : 6; }

static const char log_text[] = "the emulator was built with other kernels than these: run tests/CudaEmulator/build.sh";

int nvrtcGetProgramLogSize(Program*, size_t* bytes) {
    *bytes = sizeof log_text;
    return 0;
}

int nvrtcGetProgramLog(Program*, char* log) {
    memcpy(log, log_text, sizeof log_text);
    return 0;
}

int nvrtcGetCUBINSize(Program* program, size_t* bytes) {
    *bytes = program->name.size() + 1;
    return 0;
}

int nvrtcGetCUBIN(Program* program, char* image) {
    memcpy(image, program->name.c_str(), program->name.size() + 1);
    return 0;
}

int nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return 0;
}

const char* nvrtcGetErrorString(int error) { return error == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }

}  // extern "C"
