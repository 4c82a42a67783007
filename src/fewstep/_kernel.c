/* out = sum_i c_i v_i  on contiguous arrays, in one pass over memory; see _combine.py.

Block by block: up to eight terms of one type write a block of the output, further ones add to it
while it is in the first-level cache, so that every array is read once and the output written once.
Every product and every sum is rounded (the compiler is told not to contract them), in the type of
the output and an order that depends on the types only: an element has the same value wherever it
lies, however the work is divided, and on every machine. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) || defined(__clang__)
#define INLINE inline __attribute__((always_inline))
#define NEXT(ticket) __atomic_fetch_add(&(ticket), 1, __ATOMIC_RELAXED)
#define CAN_SHARE 1
#else
#define INLINE __forceinline
#define NEXT(ticket) ((ticket)++)
#define CAN_SHARE 0
#endif

/* Code for two generations of processors, chosen when the module is loaded. Wider vectors than
AVX2's were measured to gain nothing. */
#if defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 17)
#define CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CLONES
#endif

/* Elements of a block, terms that one loop adds: the fastest of 128 to 8192, and of 1, 4 and 8. */
enum { BLOCK = 512, TOGETHER = 8 };
enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, KINDS };
static const Py_ssize_t size_of[KINDS] = {4, 8, 2, 2};

static INLINE float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

#define SAME(v) (v)

static INLINE float of_bfloat16(uint16_t v) { return of_bits((uint32_t)v << 16); }

/* Exact, also where the processor flushes subnormals: none occurs on the way. */
static INLINE float of_float16(uint16_t v) {
    uint32_t sign = (uint32_t)(v & 0x8000u) << 16, size = v & 0x7fffu;
    /* With 224 added to the exponent inf and nan stay what they are; then down by 2^112. */
    uint32_t normal = bits_of(of_bits((size << 13) + 0x70000000u) * 0x1p-112f);
    uint32_t subnormal = bits_of(of_bits(size | 0x3f000000u) - 0.5f); /* ulp of 0.5: 2^-24 */
    uint32_t small = 0u - (uint32_t)(size < 0x400u);
    return of_bits(sign | (subnormal & small) | (normal & ~small));
}

/* `more` and `terms` are constants where this is called: no branch is left in the loop. */
#define LOOP(TOTAL, NAME, VALUE, CONVERT)                                                       \
    static INLINE void sum_##TOTAL##_##NAME(char *out, const char *const *in, const double *by, \
                                            Py_ssize_t n, int more, int terms) {                \
        TOTAL *__restrict o = (TOTAL *)out;                                                       \
        FOR_ALL(DECLARE, TOTAL, VALUE)                                                          \
        for (Py_ssize_t i = 0; i < n; i++) {                                                    \
            TOTAL total = c0 * (TOTAL)CONVERT(v0[i]);                                           \
            if (more) total = o[i] + total;                                                     \
            FOR_REST(ADD, TOTAL, CONVERT)                                                       \
            o[i] = total;                                                                       \
        }                                                                                       \
    }                                                                                           \
    CLONES static void TOTAL##_##NAME(char *o, const char *const *v, const double *c,           \
                                      Py_ssize_t n, int more, int terms) {                      \
        switch (more ? -terms : terms) { FOR_ALL(CASE, TOTAL, NAME) }                           \
    }
#define DECLARE(j, TOTAL, VALUE) \
    const VALUE *v##j = (const VALUE *)in[j]; const TOTAL c##j = (TOTAL)by[j];
#define ADD(j, TOTAL, CONVERT) if (terms > j) total += c##j * (TOTAL)CONVERT(v##j[i]);
#define CASE(j, TOTAL, NAME)                                                \
    case j + 1: sum_##TOTAL##_##NAME(o, v, c, n, 0, j + 1); break;          \
    case -j - 1: sum_##TOTAL##_##NAME(o, v, c, n, 1, j + 1); break;
#define FOR_REST(DO, A, B) \
    DO(1, A, B) DO(2, A, B) DO(3, A, B) DO(4, A, B) DO(5, A, B) DO(6, A, B) DO(7, A, B)
#define FOR_ALL(DO, A, B) DO(0, A, B) FOR_REST(DO, A, B)
#define LOOPS(TOTAL)                               \
    LOOP(TOTAL, float32, float, SAME)              \
    LOOP(TOTAL, float64, double, SAME)             \
    LOOP(TOTAL, bfloat16, uint16_t, of_bfloat16)   \
    LOOP(TOTAL, float16, uint16_t, of_float16)
LOOPS(float)
LOOPS(double)

static void (*const loop[2][KINDS])(char *, const char *const *, const double *, Py_ssize_t, int,
                                    int) = {
    {float_float32, float_float64, float_bfloat16, float_float16},
    {double_float32, double_float64, double_bfloat16, double_float16},
};

typedef struct {
    const char *v[TOGETHER];
    double c[TOGETHER];
    int kind, terms;
} Group;

typedef struct {
    char *out;
    const Group *groups;
    Py_ssize_t count, size, parts, ticket;
    int kind;
} Job;

static void work(void *argument) {
    Job *job = argument;
    for (Py_ssize_t part; (part = NEXT(job->ticket)) < job->parts;) {
        Py_ssize_t from = job->size / job->parts * part;
        Py_ssize_t to = part == job->parts - 1 ? job->size : job->size / job->parts * (part + 1);
        for (; from < to; from += BLOCK) {
            Py_ssize_t n = to - from < BLOCK ? to - from : BLOCK;
            for (Py_ssize_t i = 0; i < job->count; i++) {
                const Group *group = job->groups + i;
                const char *v[TOGETHER];
                for (int j = 0; j < TOGETHER; j++) v[j] = group->v[j] + from * size_of[group->kind];
                loop[job->kind][group->kind](job->out + from * size_of[job->kind], v, group->c, n,
                                             i > 0, group->terms);
            }
        }
    }
}

/* GOMP_parallel: call `work` once in each of so many threads, this one included. */
typedef void (*Parallel)(void (*work)(void *), void *argument, unsigned threads, unsigned flags);

PyDoc_STRVAR(combine_doc,
"combine(parallel, threads, size, out, kind, *terms)\n--\n\n"
"Write sum c v to the `size` elements at address `out`; terms: address, kind and c of every v.\n"
"kinds: 0 float32, 1 float64, 2 bfloat16, 3 float16. parallel: address of GOMP_parallel, or 0.");

static PyObject *combine(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    if (count < 8 || (count - 5) % 3 != 0) {
        PyErr_SetString(PyExc_TypeError,
                        "combine: need parallel, threads, size, out, kind, and terms of three");
        return NULL;
    }
    Parallel parallel = (Parallel)(uintptr_t)PyLong_AsVoidPtr(args[0]);
    Py_ssize_t threads = PyLong_AsSsize_t(args[1]);
    Job job = {.out = PyLong_AsVoidPtr(args[3]), .size = PyLong_AsSsize_t(args[2])};
    long kind = PyLong_AsLong(args[4]);
    Group *groups = PyMem_Calloc((size_t)(count - 5) / 3, sizeof *groups);
    if (groups == NULL) return PyErr_NoMemory();
    int sound = (kind == FLOAT32 || kind == FLOAT64) && job.size >= 0 && (job.out || !job.size);
    Py_ssize_t seen = 0;
    for (int of = 0; of < KINDS; of++) {
        Group *group = NULL;
        for (Py_ssize_t i = 5; i < count; i += 3) {
            if (PyLong_AsLong(args[i + 1]) != of) continue;
            if (group == NULL || group->terms == TOGETHER) group = groups + job.count++;
            const char *v = PyLong_AsVoidPtr(args[i]);
            if (group->terms == 0) /* addresses that are computed with, but not read */
                for (int j = 0; j < TOGETHER; j++) group->v[j] = v;
            group->v[group->terms] = v;
            group->c[group->terms++] = PyFloat_AsDouble(args[i + 2]);
            group->kind = of;
            sound &= v != NULL || job.size == 0;
            seen++;
        }
    }
    if (!PyErr_Occurred() && !(sound && seen == (count - 5) / 3))
        PyErr_SetString(PyExc_ValueError, "combine: an address, size or kind that does not exist");
    if (!PyErr_Occurred()) {
        int share = CAN_SHARE && parallel != NULL && threads > 1;
        job.kind = (int)kind;
        job.groups = groups;
        job.parts = share ? threads : 1;
        Py_BEGIN_ALLOW_THREADS
        if (share)
            parallel(work, &job, (unsigned)threads, 0);
        else
            work(&job);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(groups);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

/* Counter-based normals as _noise.py defines them, bit for bit: out = sum c z(position). */

/* A group of 64 elements has 16 counters. A sample is its index and then the keys of ten rounds, of
which the first two words are read. */
enum { LANES = 16, GROUP = 4 * LANES, SAMPLE = 21 };

/* Here AVX-512 doubles the speed. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define WIDE_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define WIDE_CLONES CLONES
#endif

typedef struct {
    uint32_t low, high;
    float weight;
} Position;

typedef struct {
    float *out;
    const float (*table)[4];
    const int64_t *samples;
    const Position *positions;
    Py_ssize_t batch, count, groups, terms, parts, ticket;
} Noise;

/* Words in the low halves of 64-bit integers: what the high halves hold never reaches them, and
vector units multiply in this form. */
#define ROUND(K)                                             \
    {                                                        \
        uint64_t p = (uint64_t)(uint32_t)a * 0xD2511F53u;    \
        uint64_t q = (uint64_t)(uint32_t)c * 0xCD9E8D57u;    \
        a = (q >> 32) ^ b ^ (uint32_t)(k + K * 0x9E3779B9u); \
        b = q;                                               \
        c = (p >> 32) ^ d ^ (uint32_t)(m + K * 0xBB67AE85u); \
        d = p;                                               \
    }

WIDE_CLONES static void fill_group(float *out, uint32_t first, const int64_t *sample,
                                   const Position *position, Py_ssize_t terms,
                                   const float (*table)[4]) {
    uint32_t index = (uint32_t)sample[0], k = (uint32_t)sample[1], m = (uint32_t)sample[2];
    for (Py_ssize_t t = 0; t < terms; t++) {
        uint32_t word[GROUP], low = position[t].low, high = position[t].high;
        int32_t segment[GROUP];
        float x[GROUP], row[GROUP][4], weight = position[t].weight;
        for (uint32_t l = 0; l < LANES; l++) {
            uint64_t a = first + l, b = index, c = low, d = high;
            ROUND(0u) ROUND(1u) ROUND(2u) ROUND(3u) ROUND(4u)
            ROUND(5u) ROUND(6u) ROUND(7u) ROUND(8u) ROUND(9u)
            word[l] = (uint32_t)a;
            word[l + LANES] = (uint32_t)b;
            word[l + 2 * LANES] = (uint32_t)c;
            word[l + 3 * LANES] = (uint32_t)d;
        }
        for (int e = 0; e < GROUP; e++) {
            uint32_t bits = bits_of((float)(int32_t)(word[e] >> 1) + 0.5f);
            segment[e] = (int32_t)(bits >> 19) - 126 * 16;
            x[e] = of_bits((bits & 0x7ffffu) | 0x3f800000u) - 1.03125f;
        }
        /* One load for each element: gathering by vector instructions was measured to be slower. */
        for (int e = 0; e < GROUP; e++) memcpy(row[e], table[segment[e]], sizeof row[e]);
        for (int e = 0; e < GROUP; e++) {
            float z = row[e][3];
            z = z * x[e] + row[e][2];
            z = z * x[e] + row[e][1];
            z = z * x[e] + row[e][0];
            z = of_bits(bits_of(z) ^ word[e] << 31) * weight;
            out[e] = t ? out[e] + z : z;
        }
    }
}

static void fill(void *argument) {
    Noise *job = argument;
    Py_ssize_t all = job->batch * job->groups;
    for (Py_ssize_t part; (part = NEXT(job->ticket)) < job->parts;) {
        Py_ssize_t to = part == job->parts - 1 ? all : all / job->parts * (part + 1);
        for (Py_ssize_t i = all / job->parts * part; i < to; i++) {
            Py_ssize_t sample = i / job->groups, group = i % job->groups;
            Py_ssize_t left = job->count - group * GROUP;
            float rest[GROUP], *out = job->out + sample * job->count + group * GROUP;
            fill_group(left < GROUP ? rest : out, (uint32_t)(group * LANES),
                       job->samples + sample * SAMPLE, job->positions, job->terms, job->table);
            if (left < GROUP) memcpy(out, rest, (size_t)left * sizeof *out);
        }
    }
}

PyDoc_STRVAR(normals_doc,
"normals(parallel, threads, batch, count, out, table, samples, *terms)\n--\n\n"
"Write sum c z to batch * count floats at address `out`; terms: c and both words of a position.\n"
"table, samples: addresses of what `_noise._table` and `_noise._lanes` make.");

static PyObject *normals(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    if (count < 10 || (count - 7) % 3 != 0) {
        PyErr_SetString(PyExc_TypeError, "normals: need parallel, threads, batch, count, out, "
                                         "table, samples, and terms of three");
        return NULL;
    }
    Parallel parallel = (Parallel)(uintptr_t)PyLong_AsVoidPtr(args[0]);
    Py_ssize_t threads = PyLong_AsSsize_t(args[1]);
    Noise job = {.batch = PyLong_AsSsize_t(args[2]), .count = PyLong_AsSsize_t(args[3]),
                 .out = PyLong_AsVoidPtr(args[4]), .table = PyLong_AsVoidPtr(args[5]),
                 .samples = PyLong_AsVoidPtr(args[6]), .terms = (count - 7) / 3};
    Position *positions = PyMem_Calloc((size_t)job.terms, sizeof *positions);
    if (positions == NULL) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < job.terms; i++) {
        PyObject *const *term = args + 7 + 3 * i;
        positions[i].weight = (float)PyFloat_AsDouble(term[0]);
        positions[i].low = (uint32_t)PyLong_AsUnsignedLong(term[1]);
        positions[i].high = (uint32_t)PyLong_AsUnsignedLong(term[2]);
    }
    int empty = job.batch == 0 || job.count == 0;
    if (!PyErr_Occurred() && (job.batch < 0 || job.count < 0 ||
                              !(empty || (job.out && job.table && job.samples))))
        PyErr_SetString(PyExc_ValueError, "normals: an address or size that does not exist");
    if (!PyErr_Occurred() && !empty) {
        int share = CAN_SHARE && parallel != NULL && threads > 1;
        job.positions = positions;
        job.groups = (job.count + GROUP - 1) / GROUP;
        job.parts = share ? threads : 1;
        Py_BEGIN_ALLOW_THREADS
        if (share)
            parallel(fill, &job, (unsigned)threads, 0);
        else
            fill(&job);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(positions);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"combine", (PyCFunction)(void (*)(void))combine, METH_FASTCALL, combine_doc},
    {"normals", (PyCFunction)(void (*)(void))normals, METH_FASTCALL, normals_doc},
    {NULL, NULL, 0, NULL},
};
static PyModuleDef_Slot slots[] = {{0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernel", NULL, 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&definition); }
