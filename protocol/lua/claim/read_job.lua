-- What a claim needs of a job, and of its checkpoint, each read once: a call of Redis costs more than what it reads.
-- Each table is made in one piece: one that grows field by field costs as much as the call.
local function read_job(id)
  local v = redis.call('HMGET', KEY.job .. id, 'status', 'last', 'created_at', 'task', 'payload', 'attempt', 'epoch',
    'client', 'timeout', 'step_ms', 'deadline', 'queue_deadline', 'company', 'degraded', 'executions', 'failed_on',
    'passed_at', 'enqueued_at', 'interrupted', 'trace', 'claimed', 'execution', 'holder', 'entered', 'started_at')
  return {
    status = v[1] or nil, last = v[2] or nil, created_at = v[3] or nil, task = v[4] or nil, payload = v[5] or nil,
    attempt = v[6] or nil, epoch = v[7] or nil, client = v[8] or nil, timeout = v[9] or nil, step_ms = v[10] or nil,
    deadline = v[11] or nil, queue_deadline = v[12] or nil, company = v[13] or nil, degraded = v[14] or nil,
    executions = v[15] or nil, failed_on = v[16] or nil, passed_at = v[17] or nil, enqueued_at = v[18] or nil,
    interrupted = v[19] or nil, trace = v[20] or nil, claimed = v[21] or nil, execution = v[22] or nil,
    holder = v[23] or nil, entered = v[24] or nil, started_at = v[25] or nil,
  }
end

local function read_point(id)
  local v = redis.call('HMGET', KEY.checkpoint .. id, 'seq', 'offset', 'fingerprint', 'at', 'chunks', 'writing')
  return { seq = v[1] or nil, offset = v[2] or nil, fingerprint = v[3] or nil, at = v[4] or nil, chunks = v[5] or nil,
    writing = v[6] or nil }
end
