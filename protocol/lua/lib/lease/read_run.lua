-- What the end of an execution needs of its job and of its checkpoint, each read once, and what it changes in the job,
-- written once: a call of Redis costs more than what it reads, and a sweep may take thousands from the dead.
local function read_run(id)
  local v = redis.call('HMGET', KEY.job .. id, 'execution', 'origin', 'task', 'started_at', 'last', 'worker_name',
    'claimed', 'cancel', 'status', 'retries_left', 'max_retries', 'attempt', 'losses', 'crashes', 'crashes_total',
    'executions', 'raised', 'best_offset', 'best_seq', 'failed_on', 'company', 'deadline', 'queue_deadline')
  return {
    execution = v[1] or nil, origin = v[2] or nil, task = v[3] or nil, started_at = v[4] or nil, last = v[5] or nil,
    worker_name = v[6] or nil, claimed = v[7] or nil, cancel = v[8] or nil, status = v[9] or nil,
    retries_left = v[10] or nil, max_retries = v[11] or nil, attempt = v[12] or nil, losses = v[13] or nil,
    crashes = v[14] or nil, crashes_total = v[15] or nil, executions = v[16] or nil, raised = v[17] or nil,
    best_offset = v[18] or nil, best_seq = v[19] or nil, failed_on = v[20] or nil, company = v[21] or nil,
    deadline = v[22] or nil, queue_deadline = v[23] or nil, changes = {},
  }
end

local function read_best(id)
  local v = redis.call('HMGET', KEY.checkpoint .. id, 'offset', 'seq', 'at', 'stepped')
  return { offset = v[1] or nil, seq = v[2] or nil, at = v[3] or nil, stepped = v[4] or nil }
end

local function change(job, name, value)
  job[name] = value
  job.changes[#job.changes + 1] = name
  job.changes[#job.changes + 1] = value
end

local function write_changes(id, job)
  if #job.changes > 0 then redis.call('HSET', KEY.job .. id, unpack(job.changes)) end
  job.changes = {}
end
