// The matrix instructions of a warp: the last lane that arrives does the work of all.
#include "emulator.h"

// The fragments of PTX's mma.m16n8k16 for 16-bit operands, row.col: g = lane / 4, t = lane % 4.
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::Lane in{};
    memcpy(in.a, a, sizeof a);
    memcpy(in.d, d, sizeof d);
    in.b[0] = b0;
    in.b[1] = b1;
    const emulator::Lane out = emulator::collective("mma.m16n8k16", ~0u, in, false, [](emulator::Lane* lanes) {
        float A[16][16], B[16][8], C[16][8];
        for (int l = 0; l < 32; l++) {
            const int g = l / 4, t = l % 4;
            const emulator::Lane& x = lanes[l];
            for (int h = 0; h < 2; h++) {
                for (int i = 0; i < 4; i++) {
                    A[g + i % 2 * 8][t * 2 + h + i / 2 * 8] = emulator::bf16_value((uint16_t)(x.a[i] >> (16 * h)));
                }

                for (int i = 0; i < 2; i++) {
                    B[t * 2 + h + i * 8][g] = emulator::bf16_value((uint16_t)(x.b[i] >> (16 * h)));
                }
            }

            for (int i = 0; i < 4; i++) {
                C[g + i / 2 * 8][t * 2 + i % 2] = x.d[i];
            }
        }

        for (int i = 0; i < 16; i++) {
            for (int k = 0; k < 16; k++) {
                for (int j = 0; j < 8; j++) {
                    C[i][j] += A[i][k] * B[k][j];
                }
            }
        }

        for (int l = 0; l < 32; l++) {
            for (int i = 0; i < 4; i++) {
                lanes[l].d[i] = C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
            }
        }
    });
    memcpy(d, out.d, sizeof d);
}

namespace emulator {

// Four 8 × 8 matrices of 16 bits whose rows the lanes have read: lane 8m + i holds row i of matrix m.
void distribute(bool transposed, const Lane& in, uint32_t (&r)[4]) {
    const Lane out = transposed
        ? collective("ldmatrix.trans", ~0u, in, false, [](Lane* lanes) {
              for (int m = 0; m < 4; m++) {
                  for (int l = 0; l < 32; l++) {
                      const int column = l / 4, row = l % 4 * 2;
                      auto element = [&](int i) { return (lanes[m * 8 + i].a[column / 2] >> (column % 2 * 16)) & 0xffff; };
                      lanes[l].r[m] = element(row) | element(row + 1) << 16;
                  }
              }
          })
        : collective("ldmatrix", ~0u, in, false, [](Lane* lanes) {
              for (int m = 0; m < 4; m++) {
                  for (int l = 0; l < 32; l++) {
                      lanes[l].r[m] = lanes[m * 8 + l / 4].a[l % 4];
                  }
              }
          });
    memcpy(r, out.r, sizeof r);
}

}  // namespace emulator
