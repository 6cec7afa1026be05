/* What decides inside llama.cpp: a callback of ggml's scheduler (cb_eval) that needs no Python per node.
 *
 * T tokens, E experts, K slots of the router's own choice, H hidden size, D router logits (= E), P kept pairs, Q regressors.
 *
 * Three files are the definitions: decision/select_one_token.py of the decision, decision/compensation.py of what stands in
 * for dropped experts, telemetry/counters.py of the bins that are counted in. callback.py is the same callback in Python.
 *
 * The scheduler asks about every node before it computes it; where the answer is true it computes up to there and calls
 * again. Of each routed layer it stops at the logits (their buffer is used again: copied), at the router's last weights
 * (decided; from here to the product with the weights, the nodes that follow from the weights or the chosen experts are
 * shortened to what is kept) and at that product (everything is as it was again; the rows of dropped slots are 0, the first
 * of them what stands in for all of them, so that the model's own sum does the rest).
 *
 * One file, so that one command compiles it. No header of ggml: `Tensor` is its struct, whose offsets checks.py compares with the library's own tensors.
 */
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct Tensor {
  int type; void *buffer; int64_t ne[4]; size_t nb[4]; int op; int32_t op_params[16]; int32_t flags;
  struct Tensor *src[10]; struct Tensor *view_src; size_t view_offs; void *data; char name[64]; void *extra; char padding[8];
} Tensor;

enum { NONE, LOGITS, TOPK, WEIGHTS, WEIGHTED };            /* nodes */
enum { LOGIT, SOFTMAX, SIGMOID };                          /* statistics */
enum { OWN, PRESERVE, SUM };                               /* weight rules */
enum { NO_ERROR, NOT_SEEN, SHAPE, TOO_MANY, MEMORY };      /* errors; a sentence each in shim.py */
enum { MOST_EDITED = 48, MOST_EXPERTS = 512, MOST_SLOTS = 64, BLOCK = 32 };  /* more are refused in checks.py */

typedef struct {                                           /* of one layer; mirrored in shim.py */
  const float *threshold_E, *offset_E;                     /* threshold_E 0: this layer is left alone */
  const double *slope_ED, *center_D;                       /* 0 where sizes do not follow the token */
  const float *vectors_JH;                                 /* mean compensation: M, then N */
  const double *low_D, *high_D, *mu_D, *whiten_DQ, *one_Q; /* linear compensation */
  const uint16_t *maps_EQH;                                /* bfloat16 */
  int64_t *counts; double *sums; int64_t *calls;           /* buffers of telemetry; 0: not counted */
  int32_t vectors, regressors;                             /* J / E; Q */
} Layer;

typedef struct {                                           /* of one model; mirrored in shim.py */
  Layer *layer;
  double temperature;
  int32_t layers, experts, slots, hidden;
  int32_t skip, change;                                    /* skip 0: dropped slots run with weight 0. change 0: only count */
  int32_t statistic, step_down, min_k, max_k, inside, rule;
  char logits[32], weights[32];                            /* names of nodes, without "ffn_moe_" and with "-" */
} Config;

typedef struct { Tensor *t; int64_t ne[4], now[4]; size_t nb[4]; Tensor *src1, *src2; bool untouched; } Edited;

typedef struct {
  Config *c;
  int layer;                                               /* of the logits and decisions that are held */
  int64_t T;
  float *logits_TE, *own_TK, *phi_TQ; int32_t *ids_TK; uint8_t *drop_TK;
  int32_t *order_N;                                        /* dropped pairs by expert */
  Tensor *top, *weights;
  Edited edited[MOST_EDITED]; int edits; bool pending;     /* pending: something was dropped in the layer in progress */
  int64_t P; bool ragged, gathered;
  float *rows_PH, *weight_P; int32_t *id_P, *token_P, *slot_P;
  size_t size_logits, size_own, size_phi, size_ids, size_drop, size_order, size_rows, size_weight, size_id, size_token, size_slot;
  Tensor rows, ids, scales;                                /* our own sources of the ragged nodes */
  int64_t error[4], pairs;
} State;

static void fail(State *s, int code, int layer, int64_t got, int64_t expected) {
  if (s->error[0]) return;
  s->error[0] = code; s->error[1] = layer; s->error[2] = got; s->error[3] = expected;
}

static bool room(State *s, void **buffer, size_t *held, size_t bytes) {
  if (bytes <= *held) return true;
  void *more = realloc(*buffer, bytes);
  if (!more) { fail(s, MEMORY, s->layer, (int64_t)bytes, 0); return false; }
  *buffer = more; *held = bytes;
  return true;
}
#define ROOM(s, what, size, bytes) room(s, (void **)&(s)->what, &(s)->size, bytes)

/* ------------------------------------------------------------------------------------------------ which node */

static bool number(const char *text, int *n) {             /* digits to the end: "weights-3 (reshaped)" is another node */
  if (*text < '0' || *text > '9') return false;
  for (*n = 0; *text >= '0' && *text <= '9'; text++) *n = *n * 10 + (*text - '0');
  return *text == 0;
}

static bool is(const char *name, const char *prefix, int *layer) {
  size_t length = strlen(prefix);
  return strncmp(name, prefix, length) == 0 && number(name + length, layer);
}

static int node(const State *s, const char *name, int *layer) {
  if (memcmp(name, "ffn_moe_", 8)) return NONE;
  name += 8;
  int kind = is(name, "topk-", layer) ? TOPK : is(name, "weighted-", layer) ? WEIGHTED
           : is(name, s->c->logits, layer) ? LOGITS : is(name, s->c->weights, layer) ? WEIGHTS : NONE;
  return kind && *layer < s->c->layers && s->c->layer[*layer].threshold_E ? kind : NONE;
}

/* ------------------------------------------------------------------------------------------------ the decision */

static double token_size(const Layer *l, const Config *c, const float *z, int expert) {
  const double *slope_D = l->slope_ED + (size_t)expert * c->experts;
  double told = 0;
  for (int d = 0; d < c->experts; d++) told += slope_D[d] * (isfinite(z[d]) ? (double)z[d] - l->center_D[d] : 0.0);
  return told < -2.0 ? -2.0 : told > 2.0 ? 2.0 : told;
}

/* decision/select_one_token.py, in its order. Returns the count; drop_K, raw count and whether logits were no numbers. */
int bh_decide(const Config *c, const Layer *l, const float *logits_E, const int32_t *own_K, uint8_t *drop_K, int32_t *raw, int32_t *lost) {
  int E = c->experts, K = c->slots, order[MOST_SLOTS];
  double found[MOST_SLOTS], highest = -INFINITY, rest = 0;
  bool nan = false;
  for (int e = 0; e < E; e++) { nan |= isnan(logits_E[e]); if (logits_E[e] > highest) highest = logits_E[e]; }
  memset(drop_K, 0, K);
  *raw = 0; *lost = nan || !isfinite(highest);
  if (*lost) return K;
  double t = c->temperature;
  if (c->statistic == SOFTMAX) {
    double total = 0;
    for (int e = 0; e < E; e++) total += exp(logits_E[e] / t - highest / t);
    rest = highest / t + log(total);
  }
  for (int i = 0; i < K; i++) {
    int e = own_K[i];
    double x = logits_E[e] / t;
    if (c->statistic == SOFTMAX) x -= rest;
    if (c->statistic == SIGMOID) x = (x < 0 ? x : 0.0) - log1p(exp(-fabs(x)));
    x += l->offset_E[e];
    if (l->slope_ED) x += token_size(l, c, logits_E, e);
    found[i] = x;
    int j = i;                                             /* ties keep their order */
    for (; j > 0 && found[order[j - 1]] < x; j--) order[j] = order[j - 1];
    order[j] = i;
  }
  int top = c->max_k < K ? c->max_k : K, within = 0;
  for (int r = 0; r < K; r++) {
    if (found[order[r]] >= l->threshold_E[r]) { *raw = r + 1; if (r + 1 <= top) within = r + 1; }
    else if (c->step_down) break;
  }
  int count = c->inside ? within : *raw;
  if (count < c->min_k) count = c->min_k;
  if (count > top) count = top;
  for (int r = count; r < K; r++) drop_K[order[r]] = 1;
  return count;
}

/* decision/weights.py: weights of the kept slots, 0 in dropped ones. */
static void weigh(const Config *c, const float *own_K, const uint8_t *drop_K, int count, float *out_K) {
  float sum = 0, all = 0;
  for (int i = 0; i < c->slots; i++) { all += own_K[i]; if (!drop_K[i]) sum += own_K[i]; }
  bool rescaled = sum > 0 && (c->rule == SUM || (c->rule == PRESERVE && count < c->slots));
  float factor = rescaled ? (c->rule == SUM ? 1.0f : all) / sum : 1.0f;
  for (int i = 0; i < c->slots; i++) out_K[i] = drop_K[i] ? 0.0f : rescaled ? own_K[i] * factor : own_K[i];
}

/* telemetry/counters.py: one token into the bins. */
static void count_token(const Config *c, const Layer *l, const float *own_K, const int32_t *ids_K, const uint8_t *drop_K, const float *weight_K, int count, int raw, int lost) {
  int E = c->experts, K = c->slots, stride = E + 1, width = E + 2;
  double total = 0, entropy = 0;
  for (int i = 0; i < K; i++) total += weight_K[i];
  for (int i = 0; i < K; i++) {
    int own = stride + ids_K[i] + (drop_K[i] ? stride : 0), expert = drop_K[i] ? E : ids_K[i];
    double share = weight_K[i] / total;
    entropy += share == 0 ? 0.0 : -share * log(share);
    l->counts[expert]++; l->sums[expert] += isfinite(weight_K[i]) ? weight_K[i] : 0.0;
    l->counts[own]++; l->sums[own] += isfinite(own_K[i]) ? own_K[i] : 0.0;
  }
  int cell = 3 * stride + (lost ? width - 1 : raw) + width * count;
  l->counts[cell]++; l->sums[cell] += isfinite(entropy) ? entropy : 0.0;
}

/* ------------------------------------------------------------------------- what stands in for dropped experts */

static void add_mean(const State *s, const Layer *l, int64_t token, float *out_H) {
  const Config *c = s->c;
  const float *w = s->own_TK + token * c->slots;
  const int32_t *id = s->ids_TK + token * c->slots;
  const uint8_t *drop = s->drop_TK + token * c->slots;
  float gone = 0;
  for (int i = 0; i < c->slots; i++) if (drop[i]) gone += w[i];
  for (int i = 0; i < c->slots; i++) {
    if (!drop[i] && l->vectors < 2) continue;
    const float *m = l->vectors_JH + ((size_t)(drop[i] ? 0 : c->experts) + id[i]) * c->hidden, by = drop[i] ? w[i] : w[i] * gone;
    for (int h = 0; h < c->hidden; h++) out_H[h] += by * m[h];
  }
}

static inline float wide(uint16_t bits) { uint32_t u = (uint32_t)bits << 16; float f; memcpy(&f, &u, 4); return f; }

/* One row: the map is streamed, four of its rows at a time; memory is what it waits for. */
static void add_row(const uint16_t *map_QH, int Q, int H, const float *f_Q, float *restrict out_H) {
  int q = 0;
  for (; q + 4 <= Q; q += 4) {
    const uint16_t *a = map_QH + (size_t)q * H, *b = a + H, *c = b + H, *d = c + H;
    float fa = f_Q[q], fb = f_Q[q + 1], fc = f_Q[q + 2], fd = f_Q[q + 3];
    for (int h = 0; h < H; h++) out_H[h] += fa * wide(a[h]) + fb * wide(b[h]) + fc * wide(c[h]) + fd * wide(d[h]);
  }
  for (; q < Q; q++) for (int h = 0; h < H; h++) out_H[h] += f_Q[q] * wide(map_QH[(size_t)q * H + h]);
}

/* Several: BLOCK columns of all of them stay in registers, which takes an n that the compiler knows. */
static inline __attribute__((always_inline)) void add_rows(const uint16_t *map_QH, int Q, int H, const int n, const float *const factor[], float *const out[]) {
  int h = 0;
  for (; h + BLOCK <= H; h += BLOCK) {
    float sum[4][BLOCK];
    for (int i = 0; i < n; i++) for (int j = 0; j < BLOCK; j++) sum[i][j] = out[i][h + j];
    for (int q = 0; q < Q; q++) {
      const uint16_t *from = map_QH + (size_t)q * H + h;
      float m[BLOCK];
      for (int j = 0; j < BLOCK; j++) m[j] = wide(from[j]);
      for (int i = 0; i < n; i++) for (int j = 0; j < BLOCK; j++) sum[i][j] += factor[i][q] * m[j];
    }
    for (int i = 0; i < n; i++) for (int j = 0; j < BLOCK; j++) out[i][h + j] = sum[i][j];
  }
  for (; h < H; h++) for (int i = 0; i < n; i++) for (int q = 0; q < Q; q++) out[i][h] += factor[i][q] * wide(map_QH[(size_t)q * H + h]);
}

/* n rows of out += factors [n, Q] times one expert's map [Q, H]. */
static void add_map(const uint16_t *map_QH, int Q, int H, int n, const float *const factor[], float *const out[]) {
  switch (n) {
    case 1: add_row(map_QH, Q, H, factor[0], out[0]); break;
    case 2: add_rows(map_QH, Q, H, 2, factor, out); break;
    case 3: add_rows(map_QH, Q, H, 3, factor, out); break;
    default: add_rows(map_QH, Q, H, 4, factor, out);
  }
}

/* Into the row of each token's first dropped slot, which is 0; `at` says where a pair's row is. */
static void add_linear(State *s, const Layer *l, const Tensor *t) {
  const Config *c = s->c;
  int D = c->experts, K = c->slots, Q = l->regressors;
  int64_t N = s->T * K;
  size_t start[MOST_EXPERTS + 1];
  if (!ROOM(s, phi_TQ, size_phi, (size_t)(s->T + 4) * Q * 4) || !ROOM(s, order_N, size_order, (size_t)N * 4)) return;
  memset(start, 0, sizeof start);
  for (int64_t n = 0; n < N; n++) if (s->drop_TK[n]) start[s->ids_TK[n] + 1]++;
  for (int i = 0; i < c->experts; i++) start[i + 1] += start[i];
  for (int64_t n = 0; n < N; n++) if (s->drop_TK[n]) s->order_N[start[s->ids_TK[n]]++] = (int32_t)n;
  int64_t gone = (int64_t)start[c->experts - 1];           /* start[i] is where i + 1 begins now */
  for (int64_t i = 0; i < s->T; i++) {
    const float *z = s->logits_TE + i * D;
    if (!memchr(s->drop_TK + i * K, 1, K)) continue;
    double phi[MOST_EXPERTS + 1];
    memcpy(phi, l->one_Q, Q * sizeof *phi);
    for (int d = 0; d < D; d++) {
      if (!isfinite(z[d])) continue;
      double x = z[d] < l->low_D[d] ? l->low_D[d] : z[d] > l->high_D[d] ? l->high_D[d] : (double)z[d];
      x -= l->mu_D[d];
      const double *whiten_Q = l->whiten_DQ + (size_t)d * Q;
      for (int q = 0; q < Q; q++) phi[q] += x * whiten_Q[q];
    }
    for (int q = 0; q < Q; q++) s->phi_TQ[i * Q + q] = (float)phi[q];
  }
  float scaled[4][MOST_EXPERTS + 1];
  for (int64_t n = 0; n < gone;) {                         /* up to four pairs of one expert at a time */
    const float *factor[4]; float *out[4]; int many = 0, expert = s->ids_TK[s->order_N[n]];
    for (; many < 4 && n < gone && s->ids_TK[s->order_N[n]] == expert; many++, n++) {
      int64_t pair = s->order_N[n], token = pair / K;
      int first = (int)((uint8_t *)memchr(s->drop_TK + token * K, 1, K) - (s->drop_TK + token * K));
      for (int q = 0; q < Q; q++) scaled[many][q] = s->own_TK[pair] * s->phi_TQ[token * Q + q];
      factor[many] = scaled[many];
      out[many] = (float *)((char *)t->data + token * t->nb[2] + first * t->nb[1]);
    }
    add_map(l->maps_EQH + (size_t)expert * Q * c->hidden, Q, c->hidden, many, factor, out);
  }
}

/* ---------------------------------------------------------------------------- shortening nodes, and undoing it */

static Edited *edited(State *s, const Tensor *t) {
  for (int i = 0; i < s->edits; i++) if (s->edited[i].t == t) return s->edited + i;
  return NULL;
}

static Edited *save(State *s, Tensor *t) {
  if (s->edits == MOST_EDITED) { fail(s, TOO_MANY, s->layer, s->edits + 1, MOST_EDITED); return NULL; }
  Edited *e = s->edited + s->edits++;
  e->t = t; e->src1 = t->src[1]; e->src2 = t->src[2]; e->untouched = true;
  memcpy(e->ne, t->ne, sizeof e->ne); memcpy(e->nb, t->nb, sizeof e->nb); memcpy(e->now, t->ne, sizeof e->now);
  return e;
}

/* In every case, also after an abort. A node that was built anew since is left as it is: it does not hold what we wrote. */
static void restore(State *s) {
  while (s->edits) {
    Edited *e = s->edited + --s->edits;
    if (e->untouched || memcmp(e->t->ne, e->now, sizeof e->now)) continue;
    memcpy(e->t->ne, e->ne, sizeof e->ne); memcpy(e->t->nb, e->nb, sizeof e->nb);
    e->t->src[1] = e->src1; e->t->src[2] = e->src2;
  }
}

static void done(Edited *e) { memcpy(e->now, e->t->ne, sizeof e->now); e->untouched = false; }

static void flat(Tensor *t, int64_t width, int64_t P, size_t row) {
  t->ne[0] = width; t->ne[1] = 1; t->ne[2] = P; t->ne[3] = 1;
  t->nb[1] = t->nb[2] = row; t->nb[3] = row * P;
}

static void stand_in(Tensor *mine, const Tensor *theirs, void *data) {
  *mine = *theirs;
  mine->op = 0; mine->view_src = NULL; mine->data = data;
  memset(mine->src, 0, sizeof mine->src);
}

/* Asked about a node between the weights and their product: shorten it if it follows from the weights or the choice. */
static void edit(State *s, Tensor *t) {
  int64_t K = s->c->slots;
  bool follows = false;
  for (int i = 0; i < 3; i++) follows |= t->src[i] && edited(s, t->src[i]);
  if (!follows || edited(s, t)) return;
  bool reshaped = t->src[0] == s->weights && t->view_src && !t->src[1];
  if (t->ne[1] != K || t->ne[2] != s->T || t->ne[3] != 1) { fail(s, SHAPE, s->layer, t->ne[1], K); return; }
  Edited *first = t->src[1] ? edited(s, t->src[1]) : NULL, *e = save(s, t);
  if (!e) return;
  if (!s->ragged) { t->ne[1] = s->P; done(e); return; }
  if (reshaped) return;                                    /* its data is replaced at the product */
  flat(t, t->ne[0], s->P, t->nb[1]);
  if (t->src[2] == s->top) {                               /* a product with the chosen experts' matrices, or their biases */
    if (!first && t->src[1]->ne[1] == 1 && t->src[1]->ne[2] == s->T) {
      Tensor *x = t->src[1];
      int64_t H = x->ne[0];
      if (!s->gathered) {
        if (!ROOM(s, rows_PH, size_rows, (size_t)s->P * H * 4)) { done(e); return; }
        for (int64_t p = 0; p < s->P; p++) memcpy(s->rows_PH + p * H, (char *)x->data + s->token_P[p] * x->nb[2], H * 4);
        stand_in(&s->rows, x, s->rows_PH);
        flat(&s->rows, H, s->P, H * 4);
        s->gathered = true;
      }
      t->src[1] = &s->rows;
    }
    stand_in(&s->ids, s->top, s->id_P);
    s->ids.ne[0] = 1; s->ids.ne[1] = s->P; s->ids.nb[0] = s->ids.nb[1] = 4; s->ids.nb[2] = s->ids.nb[3] = 4 * s->P;
    t->src[2] = &s->ids;
  } else if (first && (first->t == s->weights || first->t->src[0] == s->weights)) {
    stand_in(&s->scales, t->src[1], s->weight_P);
    flat(&s->scales, 1, s->P, 4);
    t->src[1] = &s->scales;
  }
  done(e);
}

/* -------------------------------------------------------------------------------------------------- the stops */

static void keep_logits(State *s, const Tensor *t, int layer) {
  if (t->ne[0] != s->c->experts) { fail(s, SHAPE, layer, t->ne[0], s->c->experts); return; }
  s->layer = layer; s->T = t->ne[1];
  if (!ROOM(s, logits_TE, size_logits, (size_t)s->T * s->c->experts * 4)) { s->layer = -1; return; }
  memcpy(s->logits_TE, t->data, (size_t)s->T * s->c->experts * 4);
}

static void decide(State *s, Tensor *t, int layer) {
  const Config *c = s->c;
  const Layer *l = c->layer + layer;
  Tensor *top = s->top;
  int K = c->slots;
  restore(s);                                              /* of a layer that an abort cut short */
  s->pending = false;
  if (!top || top->ne[0] != K) return;                     /* warming up, llama.cpp runs all experts */
  if (s->layer != layer || top->ne[1] != s->T) { fail(s, NOT_SEEN, layer, top->ne[1], s->T); return; }
  size_t pairs = (size_t)s->T * K, row = t->ne[0] == 1 ? t->nb[2] : t->nb[1];
  if (!s->T) return;
  if (!ROOM(s, own_TK, size_own, pairs * 4) || !ROOM(s, ids_TK, size_ids, pairs * 4) || !ROOM(s, drop_TK, size_drop, pairs)
      || !ROOM(s, id_P, size_id, pairs * 4) || !ROOM(s, token_P, size_token, pairs * 4) || !ROOM(s, slot_P, size_slot, pairs * 4)
      || !ROOM(s, weight_P, size_weight, pairs * 4)) return;
  if (l->counts) ++*l->calls;
  int64_t P = 0;
  for (int64_t i = 0; i < s->T; i++) {
    int32_t *ids = s->ids_TK + i * K, raw, lost;
    float *own = s->own_TK + i * K, *w = (float *)((char *)t->data + i * row), weight[MOST_SLOTS];
    uint8_t *drop = s->drop_TK + i * K;
    memcpy(ids, (char *)top->data + i * top->nb[1], K * 4);
    memcpy(own, w, K * 4);
    int count = bh_decide(c, l, s->logits_TE + i * c->experts, ids, drop, &raw, &lost);
    weigh(c, own, drop, count, weight);
    if (l->counts) count_token(c, l, own, ids, drop, weight, count, raw, lost);
    if (!c->change) continue;
    memcpy(w, weight, K * 4);
    for (int q = 0; q < K; q++) if (!drop[q]) {
      s->id_P[P] = ids[q]; s->token_P[P] = (int32_t)i; s->slot_P[P] = q; s->weight_P[P++] = weight[q];
    }
  }
  if (!c->change) return;
  s->pairs += c->skip ? P : (int64_t)pairs;
  s->P = P;
  s->pending = P < (int64_t)pairs;
  if (!s->pending || !c->skip) return;
  s->ragged = s->T > 1; s->gathered = false; s->weights = t;
  Edited *first = save(s, top), *second = save(s, t);
  if (!s->ragged && first && second) {                     /* one token: its kept slots to the front */
    memcpy(top->data, s->id_P, P * 4);
    memcpy(t->data, s->weight_P, P * 4);
    top->ne[0] = P;
    if (t->ne[0] == 1) t->ne[1] = P;
    done(first); done(second);
  }
}

static void fill(State *s, Tensor *t, int layer) {
  const Config *c = s->c;
  const Layer *l = c->layer + layer;
  int K = c->slots;
  bool skipped = s->edits > 0;
  restore(s);
  if (!s->pending || s->layer != layer || s->error[0]) return;
  s->pending = false;
  if (t->ne[0] != c->hidden && (l->vectors || l->regressors)) { fail(s, SHAPE, layer, t->ne[0], c->hidden); return; }
  size_t row = t->nb[1];
  char *out = t->data;
  if (skipped)                                             /* from the last: a row never lies behind its place */
    for (int64_t p = s->P - 1; p >= 0; p--) {
      char *to = out + s->token_P[p] * t->nb[2] + s->slot_P[p] * row, *from = out + p * row;
      if (to != from) memmove(to, from, row);
    }
  for (int64_t i = 0; i < s->T; i++) {
    char *first = NULL;
    for (int q = 0; q < K; q++) if (s->drop_TK[i * K + q]) {
      char *at = out + i * t->nb[2] + q * row;
      if (skipped || !first) memset(at, 0, row);
      if (!first) first = at;
    }
    if (first && l->vectors) add_mean(s, l, i, (float *)first);
  }
  if (l->regressors) add_linear(s, l, t);
}

/* ------------------------------------------------------------------------------------------- for shim.py to call */

bool bh_callback(Tensor *t, bool ask, void *user) {
  State *s = user;
  int layer, kind = node(s, t->name, &layer);
  if (!ask) {
    if (kind == LOGITS) keep_logits(s, t, layer);
    else if (kind == WEIGHTS) decide(s, t, layer);
    else if (kind == WEIGHTED) fill(s, t, layer);
    return true;                                           /* false would end this part of the graph, not the decode */
  }
  if (s->edits) edit(s, t);
  if (kind == TOPK) s->top = t;
  return kind == LOGITS || kind == WEIGHTS || (kind == WEIGHTED && s->pending);
}

State *bh_new(Config *c) {
  State *s = calloc(1, sizeof *s);
  if (s) { s->c = c; s->layer = -1; }
  return s;
}

void bh_free(State *s) {
  void *held[] = {s->logits_TE, s->own_TK, s->phi_TQ, s->ids_TK, s->drop_TK, s->order_N, s->rows_PH, s->weight_P, s->id_P, s->token_P, s->slot_P};
  for (size_t i = 0; i < sizeof held / sizeof *held; i++) free(held[i]);
  free(s);
}

/* After every decode, whatever came of it: all as it was; the first error, and 0 from then on. */
void bh_end(State *s, int64_t error[4]) {
  restore(s);
  s->pending = false; s->layer = -1;
  memcpy(error, s->error, sizeof s->error);
  memset(s->error, 0, sizeof s->error);
}

int64_t bh_pairs(State *s, bool reset) { int64_t n = s->pairs; if (reset) s->pairs = 0; return n; }

/* What cb_eval is set to: whoever is in charge of a context, which may change between decodes. */
typedef struct { bool (*call)(Tensor *, bool, void *); void *user; } Hook;

Hook *bh_hook_new(void) { return calloc(1, sizeof(Hook)); }
void bh_hook_set(Hook *h, bool (*call)(Tensor *, bool, void *), void *user) { h->call = call; h->user = user; }
bool bh_hook(Tensor *t, bool ask, void *hook) { Hook *h = hook; return h->call ? h->call(t, ask, h->user) : false; }

/* Sizes and offsets as this compiler laid them out, for checks.py to compare with ctypes and with ggml's own tensors. */
int bh_layout(int64_t *out) {
  int64_t all[] = {sizeof(Tensor), offsetof(Tensor, type), offsetof(Tensor, ne), offsetof(Tensor, nb), offsetof(Tensor, op), offsetof(Tensor, src),
    offsetof(Tensor, view_src), offsetof(Tensor, data), offsetof(Tensor, name), sizeof(Layer), sizeof(Config), offsetof(Config, logits)};
  memcpy(out, all, sizeof all);
  return sizeof all / sizeof *all;
}
