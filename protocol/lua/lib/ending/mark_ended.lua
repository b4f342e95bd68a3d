--- @include lib/basics/dates

-- Write the end of a request into its hash. execution: '' if nobody held it; the rest are more fields and their values.
local function mark_ended(id, execution, state, ...)
  redis.call('HSET', KEY.job .. id, 'status', state, 'ended_at', utc(), 'execution', '',
    'last', (execution ~= '' and execution or '-') .. ':' .. state, ...)
end
